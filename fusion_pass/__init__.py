"""fusedhead: a torch.compile backend that computes a head's loss without building its logits.

    model = torch.compile(model, backend="fusedhead")

Nothing else changes. ``fusedhead.explain(model)(*inputs)`` says what was fused, and why not what was not.
Programs that cannot name a backend: ``fusedhead.enable()``, or ``fusedhead run script.py`` from outside.
"""

import logging

from fusedhead.backend import FusedHeadError, fusedhead
from fusedhead.deferred.state import StaleLogits
from fusedhead.eager.defer import defer
from fusedhead.estimate import estimate
from fusedhead.explain import explain
from fusedhead.functional.linear_cross_entropy import linear_cross_entropy
from fusedhead.lowering.ops import LabelOutOfRange
from fusedhead.report.report import HeadRecord, Report
from fusedhead.run.enable import changes, disable, enable
from fusedhead.version import __version__

# Information is for those who ask for it by this logger's name (TORCH_LOGS="fusedhead" does): a program that logs its
# own INFO from the root logger is not written into.
if logging.getLogger("fusedhead").level == logging.NOTSET:
    logging.getLogger("fusedhead").setLevel(logging.WARNING)

__all__ = [
    "FusedHeadError",
    "HeadRecord",
    "LabelOutOfRange",
    "Report",
    "StaleLogits",
    "__version__",
    "changes",
    "defer",
    "disable",
    "enable",
    "estimate",
    "explain",
    "fusedhead",
    "linear_cross_entropy",
]


def __dir__() -> list[str]:
    """The public names: what is imported beside them is no part of the interface."""
    return sorted(__all__)

"""fusedhead: a torch.compile backend that computes a head's loss without building its logits.

    model = torch.compile(model, backend="fusedhead")

Nothing else changes. ``fusedhead.explain(model)(*inputs)`` says what was fused, and why a head was not.
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
from fusedhead.report.head_record import HeadRecord
from fusedhead.report.report import Report
from fusedhead.run.enable import changes, disable, enable
from fusedhead.version import __version__

# INFO is logged only where this logger is enabled by name (TORCH_LOGS="fusedhead" does), so that a program with INFO on
# its root logger gets no lines from here.
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
    """The public names. Imported modules are no part of the interface."""
    return sorted(__all__)

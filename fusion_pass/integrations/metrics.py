"""The numbers: heads fused and left, net bytes of a step, and how often deferred logits were answered and built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusedhead.report import observers
from fusedhead.report.summary import Summary

METRIC_PREFIX = "fusedhead/"


class Watch:
    """Observes every graph that is compiled from now on, until `stop`; again after `start`.

    A copy, and one that is sent to another process, begins anew.
    """

    def __init__(self) -> None:
        self.summary = Summary()
        self.logged: dict[str, float] = {}
        self.remove: Callable[[], None] | None = None
        self.start()

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

    def start(self) -> None:
        """Observe. Does nothing where it does already."""
        if self.remove is None:
            self.remove = observers.add(self.summary.add, texts=False)

    def stop(self) -> None:
        """Observe no further graphs. The numbers of those that were seen still change."""
        if self.remove is not None:
            self.remove()
            self.remove = None

    def metrics(self) -> dict[str, float]:
        """The numbers so far, as a flat dictionary for loggers.

        ``bytes_saved`` is an estimate of the bytes that a step saves compared with Inductor, net of the workspace, for
        the compiled graph that saves most. It is negative where a step takes more.
        """
        overview = self.summary.overview()
        runs = [head.run for head in overview.heads]
        fused = sum(head.fused for head in overview.heads)
        return {
            f"{METRIC_PREFIX}heads_fused": float(fused),
            f"{METRIC_PREFIX}heads_left": float(len(overview.heads) - fused),
            f"{METRIC_PREFIX}bytes_saved": float(overview.saved),
            f"{METRIC_PREFIX}logits_answered": float(sum(run.answered.value for run in runs)),
            f"{METRIC_PREFIX}logits_built": float(sum(run.built.total + run.at_once.total for run in runs)),
        }

    def news(self) -> dict[str, float]:
        """The numbers if heads, bytes or built logits have changed since the last call, else {}. To be called every
        step.

        The number of answers changes every step and does not count as a change.
        """
        metrics = self.metrics()
        judged = {name: value for name, value in metrics.items() if not name.endswith("answered")}
        if judged == self.logged or not self.summary.reports:
            return {}
        self.logged = judged
        return metrics


def add_to_tensorboard(writer: Any, metrics: dict[str, float], step: int) -> None:
    """``writer``: a ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar``."""
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)

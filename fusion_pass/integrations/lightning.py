"""A callback for Lightning: ``Trainer(callbacks=[FusedHeadCallback()])``."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fusedhead.integrations.metrics import Watch

# the same under its old name
_lightning: Any = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning")


class FusedHeadCallback(_lightning.Callback):
    """Logs the numbers to every logger of the trainer after a batch that has changed one."""

    def __init__(self) -> None:
        super().__init__()
        self.watch = Watch()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.watch.start()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *rest: Any
    ) -> None:
        if trainer.is_global_zero and (news := self.watch.news()):
            for logger in trainer.loggers:
                logger.log_metrics(news, step=trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.watch.stop()

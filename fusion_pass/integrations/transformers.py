"""A callback for transformers' Trainer, and so for TRL's: ``trainer.add_callback(FusedHeadCallback(trainer))``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fusedhead.integrations.metrics import Watch


class FusedHeadCallback(TrainerCallback):
    """Logs through ``trainer.log``, which reaches every logger in ``report_to``, after a step that has changed a
    number.

    Without a trainer (``callbacks=[FusedHeadCallback()]``, when none exists yet) the numbers are added to the trainer's
    next logs: its progress bar shows them, and callbacks that run before this one do not see them.
    """

    def __init__(self, trainer: Any = None) -> None:
        self.trainer = trainer
        self.watch = Watch()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is not None and state.is_world_process_zero and (news := self.watch.news()):
            asked = control.should_log  # the trainer takes any log for its own of this step, whose loss is due yet
            self.trainer.log(news)
            control.should_log = asked

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.trainer is None and logs is not None:
            logs.update(self.watch.news())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.stop()

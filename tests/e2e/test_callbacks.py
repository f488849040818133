"""The callbacks of fusedhead.integrations in transformers' Trainer and in Lightning, as both call them."""

from __future__ import annotations

import copy
import csv
import pickle
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from fusedhead.integrations.lightning import FusedHeadCallback as OfLightning
from fusedhead.integrations.transformers import FusedHeadCallback as OfTransformers
from tests.e2e.comparison import switched_on
from tests.e2e.models import llama
from tests.e2e.test_lightning import Language
from tests.e2e.test_trainer import arguments
from tests.e2e.text import examples, tokens

FUSED = "fusedhead/heads_fused"


def test_the_trainer_logs_the_numbers_once_beside_every_loss_of_its_own(tmp_path: Path) -> None:
    torch.compiler.reset()
    with switched_on("deferred"):
        trainer = Trainer(llama(), arguments(tmp_path, True), train_dataset=examples(24))
        trainer.add_callback(OfTransformers(trainer))
        trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    assert [(entry["step"], entry[FUSED]) for entry in history if FUSED in entry] == [(1, 1)]


def test_a_callback_that_is_given_before_there_is_a_trainer_adds_to_its_logs(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class After(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    torch.compiler.reset()
    with switched_on("deferred"):
        callbacks = [OfTransformers(), After()]
        trainer = Trainer(llama(), arguments(tmp_path, True), train_dataset=examples(24), callbacks=callbacks)
        trainer.train()
    assert [logs[FUSED] for logs in seen if FUSED in logs] == [1]
    assert len([logs for logs in seen if "loss" in logs]) == 4


def test_lightning_writes_the_numbers_to_its_logger(tmp_path: Path) -> None:
    torch.compiler.reset()
    callback = OfLightning()
    logger = CSVLogger(tmp_path)
    with switched_on("deferred"):
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=logger,
            callbacks=[callback],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        loader = DataLoader(tokens(4, 4, 32), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(torch.compile(Language()), loader)
    with (Path(logger.log_dir) / "metrics.csv").open() as lines:
        told = [row for row in csv.DictReader(lines) if row.get(FUSED)]
    assert [(row["step"], float(row[FUSED])) for row in told] == [("1", 1.0)]


def test_lightning_s_callback_can_be_sent_to_a_process_that_a_strategy_spawns() -> None:
    callback = OfLightning()
    for each in (callback, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        each.watch.stop()

"""Lightning: a compiled LightningModule whose training_step holds the model and the loss."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from tests.e2e.comparison import Trained, check, weights
from tests.e2e.models import llama
from tests.e2e.text import tokens


class Language(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = llama()
        self.seen: dict[str, float] = {}

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        logits = self(batch)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: Tensor, index: int) -> None:
        self.seen[f"loss {index}"] = float(outputs["loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def test_a_lightning_module(tmp_path: Path) -> None:
    def program(compiled: bool) -> Trained:
        module = Language()
        before = weights(module)
        loader = DataLoader(tokens(4, 4, 32), batch_size=None)  # type: ignore[arg-type]
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(torch.compile(module) if compiled else module, loader)
        return Trained(module.seen, before, weights(module))

    check(program, heads=1)


def test_its_strategy_for_fsdp1_is_not_for_processors() -> None:
    """What the table of frameworks says of it: Lightning refuses before anything is compiled."""
    with pytest.raises(ValueError, match="requires a GPU accelerator"):
        lightning.Trainer(accelerator="cpu", devices=2, strategy="fsdp")

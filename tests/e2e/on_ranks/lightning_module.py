"""A LightningModule under Lightning's ModelParallelStrategy, which shards it in ``configure_model``."""

from __future__ import annotations

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from tests.e2e.models import llama
from tests.e2e.on_ranks.arguments import LENGTH, ROWS, STEPS, finish
from tests.e2e.text import tokens


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        torch.manual_seed(0)
        self.model = llama()
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        logits = self.model(input_ids=batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.seen.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), 1e-3)


def main() -> None:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=STEPS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    rows = torch.cat(tokens(STEPS, ROWS, LENGTH))
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=ROWS // 2, shuffle=False))
    finish(module.seen)


if __name__ == "__main__":
    main()

"""A LightningModule with a fused head, one word more than without: `python examples/lightning_module.py`.

The module's forward returns logits and `training_step` takes the loss of them, as Lightning's own examples do; it is
compiled with `backend="fusedhead"`. What one sees is the loss falling, and in the report one head, deferred and
answered by the loss. Tokens are bytes of Python's standard library. Needs lightning.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fusedhead


class Language(lightning.LightningModule):
    """A recurrent language model over a large vocabulary; tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, vocab: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.mixer = nn.Conv1d(width, width, kernel_size=3)
        self.head = nn.Linear(width, vocab, bias=False)
        self.losses: list[float] = []

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.pad(self.embedding(tokens).transpose(1, 2), (2, 0))
        return self.head(torch.tanh(self.mixer(x)).transpose(1, 2))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: Tensor, index: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="fusedhead", help="any backend of torch.compile")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(argv)
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()
    windows = torch.tensor(list(text[: len(text) // (args.length + 1) * (args.length + 1)])).view(-1, args.length + 1)
    torch.manual_seed(0)
    module = Language(args.vocab)
    trainer = lightning.Trainer(
        max_steps=args.steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(windows, batch_size=8, drop_last=True)
    device = trainer.strategy.root_device  # where it trains; Lightning takes the module back to the CPU afterwards
    trainer.fit(torch.compile(module, backend=args.backend), loader)
    print("loss", *(f"{loss:.4f}" for loss in module.losses))
    if args.backend == "fusedhead":
        again = Language(args.vocab).to(device)  # afresh: Lightning keeps the compiled forward
        print(fusedhead.explain(again)(windows[:8, :-1].to(device)))
    return module.losses


if __name__ == "__main__":
    main()

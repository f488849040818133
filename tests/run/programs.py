"""Programs as users write them, for the tests of enable and of the command: none of them knows fusedhead."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

MODEL = """
import sys
import torch
import torch.nn.functional as F
from torch import nn

class Model(nn.Module):
    def __init__(self, vocab=512, width=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens, labels):
        logits = self.head(torch.tanh(self.mix(self.embedding(tokens))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
"""

TRAINING = (
    MODEL
    + """
def train(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(steps):
        tokens = torch.randint(0, 512, (2, 16))
        loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{loss.item():.4f}")

if __name__ == "__main__":
    torch.manual_seed(0)
    model = Model()
    train(COMPILED)
"""
)

COMPILED = TRAINING.replace("COMPILED", "torch.compile(model, backend='inductor')")
EAGER = TRAINING.replace("COMPILED", "model")


def write(folder: Path, text: str, name: str = "program.py") -> Path:
    path = folder / name
    path.write_text(dedent(text))
    return path

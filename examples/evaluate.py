"""Evaluate a language model: perplexity, top-1 and top-5 accuracy of its logits: `python examples/evaluate.py`.

The model is compiled and returns its logits, as models do; a short training takes a loss of them, and then the
evaluation three numbers. What one sees is the perplexity before and after, the same as with `--backend eager`, and
what became of the logits: they are returned *deferred*, each number is answered window by window, and none is built.
`fusedhead run` prints the same summary for a program that does not ask for it.

Tokens are words of Python's standard library, hashed into the vocabulary: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedhead.report import observers
from fusedhead.report.summary import Summary

MODULES = ("argparse", "ast", "dataclasses", "functools", "heapq", "inspect", "json/decoder", "textwrap")


class Language(nn.Module):
    """A recurrent language model; tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.mixer = nn.Conv1d(width, width, kernel_size=3)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.pad(self.embedding(tokens).transpose(1, 2), (2, 0))
        return self.head(torch.tanh(self.mixer(x)).transpose(1, 2))


def batches(args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and the ones that follow them, [batch, length] each."""
    folder = Path(sysconfig.get_path("stdlib"))
    words = re.findall(r"\w+|[^\w\s]", "".join((folder / f"{name}.py").read_text() for name in MODULES))
    ids = torch.tensor([zlib.crc32(word.encode()) % args.vocab for word in words], device=args.device)
    size = args.batch * args.length
    for start in range(0, min(len(ids) - 1, size * args.steps) // size * size, size):
        window = ids[start : start + size + 1]
        yield window[:-1].view(args.batch, -1), window[1:].view(args.batch, -1)


def train(model: nn.Module, data: Iterator[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in data:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: nn.Module, data: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Perplexity and accuracies over all tokens. Sums stay on the device until the end."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for x, y in data:
        logits = model(x)  # [B, T, V], deferred
        nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
        top1 = (logits.argmax(-1) == y).sum()
        top5 = (logits.topk(5, dim=-1).indices == y[..., None]).any(-1).sum()
        sums = sums.to(x.device) + torch.stack([nll.double(), top1.double(), top5.double()])
        count += y.numel()
    nll, top1, top5 = (sums / count).tolist()
    return {"perplexity": float(torch.tensor(nll).exp()), "top-1": top1, "top-5": top5}


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="fusedhead", help="any backend of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = Language(args.vocab, args.width).to(args.device)
    summary = Summary()
    observers.add(summary.add)
    compiled = torch.compile(model, backend=args.backend)
    scores = [evaluate(compiled, batches(args))]
    train(compiled, batches(args))
    scores.append(evaluate(compiled, batches(args)))
    for when, numbers in zip(("before", "after"), scores):
        print(f"{when:6}", ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    if args.backend == "fusedhead":
        print(summary)
    return scores


if __name__ == "__main__":
    main()

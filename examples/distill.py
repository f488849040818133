"""Distil a teacher into a student: cross-entropy plus a divergence between two heads: `python examples/distill.py`.

Both models project onto the same vocabulary, and the loss looks at every logit of both. What one sees is the loss
falling, and in the report two heads of which neither builds its logits: the divergence runs token by token, some
tokens at a time, with the teacher frozen.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedhead


class Language(nn.Module):
    """Embedding, one hidden layer, head; tokens [N] -> logits [N, V]."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


class Distillation(nn.Module):
    """The loss of Hinton et al. (arXiv 1503.02531): (1 - a) CE(student, y) + a t^2 KL(teacher || student)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, temperature: float = 2.0, share: float = 0.5) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()
        self.temperature, self.share = temperature, share

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.student(x)
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(x) / self.temperature, dim=-1)
        ours = F.log_softmax(logits / self.temperature, dim=-1)
        divergence = F.kl_div(ours, wanted, log_target=True, reduction="batchmean") * self.temperature**2
        return (1 - self.share) * F.cross_entropy(logits, y) + self.share * divergence


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="fusedhead", help="any backend of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--tokens", type=int, help="in a batch (default: 1024 on a CPU, 32768 on a GPU)")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args(argv)
    # on a GPU a program of fewer than 4 GiB of logits is faster with them built, and is left to Inductor
    tokens = args.tokens or (1024 if args.device == "cpu" else 32768)
    torch.manual_seed(0)
    student, teacher = Language(args.vocab, 64), Language(args.vocab, 128)
    with torch.no_grad():
        teacher.head.weight.mul_(4)  # a teacher that is sure of something
    loss_of = Distillation(student, teacher).to(args.device)
    step = torch.compile(loss_of, backend=args.backend)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    x = torch.randint(args.vocab, (tokens,), device=args.device)
    with torch.no_grad():
        y = teacher(x).argmax(-1)  # labels that the teacher agrees with
    for _ in range(args.steps):
        loss = step(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print("loss", *(f"{loss:.4f}" for loss in losses))
    if args.backend == "fusedhead":
        print(fusedhead.explain(loss_of)(x, y))
    return losses


if __name__ == "__main__":
    main()

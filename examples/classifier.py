"""Train a classifier with 21,000 classes, as of ImageNet-21k: `python examples/classifier.py`.

Label smoothing and accuracy come from the same logits. With many classes the head is most of the work of a small model;
what one sees is the loss falling and the accuracy rising, and in the report one head whose logits were never built.
Images are noisy copies of one prototype a class, so nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedhead


class Classifier(nn.Module):
    """A small convolutional network; images [N, 3, 16, 16] and labels [N] -> loss, number of hits."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=4, stride=4), nn.GELU(), nn.Flatten(), nn.Linear(16 * width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.norm(self.body(images)))  # [N, classes]
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        return loss, (logits.argmax(-1) == labels).sum()


class Images:
    """Noisy copies of one prototype a class, drawn anew on every call."""

    def __init__(self, classes: int, seen: int, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.randint(classes, (seen,), generator=generator)  # the classes that occur
        self.prototypes = torch.randn(seen, 3, 16, 16, generator=generator)
        self.device = device

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        i = torch.randint(len(self.labels), (batch,))
        images = self.prototypes[i] + 0.3 * torch.randn(batch, 3, 16, 16)
        return images.to(self.device), self.labels[i].to(self.device)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="fusedhead", help="any backend of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--classes", type=int, default=21_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = Classifier(args.classes).to(args.device)
    step = torch.compile(model, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, losses = Images(args.classes, seen=64, device=args.device), []
    for i in range(args.steps):
        x, y = images.draw(args.batch)
        loss, hits = step(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if i % max(1, args.steps // 5) == 0 or i == args.steps - 1:
            print(f"step {i:3}  loss {loss.item():.4f}  accuracy {hits.item() / args.batch:.2f}")
    if args.backend == "fusedhead":
        print(fusedhead.explain(model)(x, y))
    return losses


if __name__ == "__main__":
    main()

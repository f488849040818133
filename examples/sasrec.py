"""Train a sequential recommender (SASRec) over its whole catalogue: `python examples/sasrec.py`.

Recommenders usually sample some hundred negatives a position, because the [B, T, items] logits of the full softmax do
not fit. Here every item of the catalogue is a negative and the logits are never built, in training and in the ranking
metrics (hit rate and NDCG at 10) alike. What one sees is both metrics rising, and one head in the report.

SASRec: Kang and McAuley, arXiv 1808.09781. Histories are walks over a random ring of items; item 0 is padding.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedhead


class SASRec(nn.Module):
    """A causal self-attention block over a history [B, T]; scores are products with the item embeddings (tied)."""

    def __init__(self, items: int, length: int, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width, padding_idx=0)
        self.positions = nn.Embedding(length, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.heads = heads
        nn.init.normal_(self.items.weight, std=width**-0.5)

    def forward(self, history: Tensor) -> Tensor:
        """Hidden states [B, T, D]."""
        b, t = history.shape
        x = self.items(history) + self.positions.weight[:t]
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.norm3(x + self.down(F.relu(self.up(self.norm2(x)))))


class Objective(nn.Module):
    """Full-softmax loss, whether each of the ten best items was really next, and which positions are no padding."""

    def __init__(self, model: SASRec) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.model(history) @ self.model.items.weight.T  # [B, T, items]
        loss = F.cross_entropy(scores.flatten(0, 1), following.flatten(), ignore_index=0)
        with torch.no_grad():
            best = scores.topk(10, dim=-1).indices == following[..., None]  # [B, T, 10]
        return loss, best, following != 0


def walks(ring: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Histories and what follows: a walk along the ring, padded at the end of some."""
    start = torch.randint(len(ring), (batch, 1))
    walk = ring[(start + torch.arange(length + 1)) % len(ring)]
    history, following = walk[:, :-1].clone(), walk[:, 1:].clone()
    short = torch.arange(length) >= torch.randint(length // 2, length + 1, (batch, 1))
    history[short], following[short] = 0, 0
    return history, following


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="fusedhead", help="any backend of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--items", type=int, default=30_000, help="in the catalogue")
    parser.add_argument("--batch", type=int, help="histories (default: 32 on a CPU, 1024 on a GPU)")
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args(argv)
    # on a GPU a program of fewer than 4 GiB of logits is faster with them built, and is left to Inductor
    batch = args.batch or (32 if args.device == "cpu" else 1024)
    torch.manual_seed(0)
    objective = Objective(SASRec(args.items, args.length)).to(args.device)
    step = torch.compile(objective, backend=args.backend)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    ring, losses = torch.randperm(args.items - 1)[:200] + 1, []
    for i in range(args.steps):
        history, following = (z.to(args.device) for z in walks(ring, batch, args.length))
        loss, best, real = step(history, following)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if i % max(1, args.steps // 4) == 0 or i == args.steps - 1:
            hits = best.any(-1)[real].float().mean().item()
            gain = (best / torch.log2(torch.arange(2, 12, device=best.device))).sum(-1)[real].mean().item()
            print(f"step {i:3}  loss {loss.item():.4f}  HR@10 {hits:.3f}  NDCG@10 {gain:.3f}")
    if args.backend == "fusedhead":
        print(fusedhead.explain(objective)(history, following))
    return losses


if __name__ == "__main__":
    main()

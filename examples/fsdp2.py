"""Train with plain FSDP2, two processes and more: `torchrun --nproc-per-node 2 examples/fsdp2.py`.

Every block is a unit of its own and compiled by itself, as is usual, and so is the head: a module that holds norm,
projection and loss. FSDP gathers a unit's weights before its forward and frees them after it, so the loss has to be
inside the unit. (Compiling the whole model instead breaks graphs at each unit's hooks.) What one sees, from rank 0,
is the loss falling as on one process, the batch being split, and one fused head.

On a CPU processes talk through gloo, on GPUs through NCCL. Run it without torchrun for one process.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fusedhead.report import observers
from fusedhead.report.summary import Summary


class Block(nn.Module):
    """A pre-norm MLP block, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Head(nn.Module):
    """Hidden states [B, T, D] and what follows them [B, T] -> mean cross-entropy."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.project(self.norm(h)).flatten(0, 1), y.flatten())


class Language(nn.Module):
    """Tokens [B, T] and what follows them -> mean cross-entropy."""

    def __init__(self, vocab: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = Head(vocab, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h, y)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="fusedhead", help="any backend of torch.compile")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=8, help="of all processes together")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29561"}.items():
        os.environ.setdefault(name, value)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights and tokens on every rank
    mesh, model = init_device_mesh(device, (ranks,)), Language(args.vocab).to(device)
    for unit in (*model.blocks, model.head):
        unit.compile(backend=args.backend)  # in place
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    summary = Summary()
    observers.add(summary.add)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    tokens = torch.randint(args.vocab, (args.batch, args.length + 1), device=device)
    mine, losses = tokens.chunk(ranks)[rank], []
    for _ in range(args.steps):
        loss = model(mine[:, :-1], mine[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / ranks)
    if rank == 0:
        print("loss", *(f"{loss:.4f}" for loss in losses))
        print(summary)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()

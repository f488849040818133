"""torchtitan: blocks compiled and sharded one by one, the head eager in a unit with the norm, its loss compiled."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtitan.components.loss import cross_entropy_loss

from tests.e2e.on_ranks.arguments import LENGTH, ROWS, STEPS, finish, mine, start
from tests.e2e.text import VOCAB, tokens

DIM = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.nn.functional.silu(self.up(self.norm(h))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings, self.layers = nn.Embedding(VOCAB, DIM), nn.ModuleDict({"0": Block(), "1": Block()})
        self.norm, self.output = nn.RMSNorm(DIM), nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h)
        return self.output(self.norm(h))


def main() -> None:
    start()
    model, mesh = Decoder(), init_device_mesh("cpu", (dist.get_world_size(),))
    policy = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(torch.float32, torch.float32)}
    for layer in model.layers.values():
        layer.compile(fullgraph=True)
        fully_shard(layer, reshard_after_forward=True, **policy)
    fully_shard([model.norm, model.output], reshard_after_forward=False, **policy)
    fully_shard(model, **policy)
    loss_of = torch.compile(cross_entropy_loss)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for batch in mine(tokens(STEPS, ROWS, LENGTH)):
        labels = batch[:, 1:].contiguous()
        loss = loss_of(model(batch[:, :-1]), labels) / labels.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    finish(losses)


if __name__ == "__main__":
    main()

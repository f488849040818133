"""Training programs on several processes: GPT-2 124M under DDP and FSDP2, and Qwen3 0.6B under FSDP2.

Each makes, for a backend of ``torch.compile``, a model and a step: a function of tokens and labels [B, T] that returns
the mean loss of this rank. To add one, add a function and a line of GPT or QWEN3. Nothing here measures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedhead
from benchmarks.qwen3 import SIZES

POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
Step = Callable[[Tensor, Tensor], Tensor]
sys.path.append(str(Path(__file__).parents[1] / "examples"))  # whose GPT this is


class Sizes(NamedTuple):
    """What every program is told."""

    device: str
    tiny: bool
    batch: int  # sequences of a rank
    length: int
    vocab: int


Make = Callable[[Sizes, str], tuple[nn.Module, Step]]


def tokens(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Arithmetic progressions of token ids [B, T], and what follows them: something to learn, another on each rank."""
    at = torch.arange(sizes.length + 1, device=sizes.device)
    stride = torch.randint(1, 50, (sizes.batch, 1), device=sizes.device)
    start = torch.randint(0, 1000, (sizes.batch, 1), device=sizes.device)
    ids = (start + stride * at) % min(sizes.vocab, 5000)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), y.view(-1), ignore_index=-1)


def gpt_model(sizes: Sizes) -> Any:
    """The example's GPT, which returns (logits, loss), or the logits of all tokens where no labels are given."""
    import gpt

    class Model(gpt.GPT):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
            for block in self.blocks:
                h = block(h)
            logits = self.head(self.norm(h))
            if y is None:
                return logits
            return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)

    config = gpt.Config(2, 2, 64, sizes.vocab, sizes.length) if sizes.tiny else gpt.SIZES["124M"]
    return Model(config).to(sizes.device)


def ddp(sizes: Sizes, model: nn.Module) -> nn.Module:
    devices = [torch.cuda.current_device()] if sizes.device == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def sharded(sizes: Sizes, model: nn.Module, units: Iterable[nn.Module] = ()) -> nn.Module:
    mesh = init_device_mesh(sizes.device, (dist.get_world_size(),))
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=POLICY)
    return fully_shard(model, mesh=mesh, mp_policy=POLICY)


def keeping(run: Callable[..., Any]) -> Step:
    """A step of a model that returns (logits, loss), whose logits the caller holds until the next step, unread."""
    held: list[Any] = [None]

    def step(x: Tensor, y: Tensor) -> Tensor:
        held[0], loss = run(x, y)
        return loss  # type: ignore[no-any-return]

    return step


def under_autocast(sizes: Sizes, step: Step) -> Step:
    def run(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(sizes.device, torch.bfloat16):
            return step(x, y)

    return run


def ddp_inside(sizes: Sizes, backend: str) -> tuple[nn.Module, Step]:
    model = gpt_model(sizes)
    return model, under_autocast(sizes, keeping(torch.compile(ddp(sizes, model), backend=backend)))


def ddp_outside(sizes: Sizes, backend: str) -> tuple[nn.Module, Step]:
    model = gpt_model(sizes)
    run = torch.compile(ddp(sizes, model), backend=backend)
    return model, under_autocast(sizes, lambda x, y: cross_entropy(run(x), y))


def fsdp_inside(sizes: Sizes, backend: str) -> tuple[nn.Module, Step]:
    """One unit, one graph."""
    model = gpt_model(sizes)
    return model, keeping(torch.compile(sharded(sizes, model), backend=backend))


def fsdp_outside(sizes: Sizes, backend: str) -> tuple[nn.Module, Step]:
    model = gpt_model(sizes)
    run = torch.compile(sharded(sizes, model), backend=backend)
    return model, lambda x, y: cross_entropy(run(x), y)


def fsdp_resharded(sizes: Sizes, backend: str) -> tuple[nn.Module, Step]:
    """A root that is resharded after its forward."""
    model = gpt_model(sizes)
    sharded(sizes, model)
    model.set_reshard_after_forward(True)
    run = torch.compile(model, backend=backend)
    return model, lambda x, y: run(x, y)[1]


def fsdp_by_block(sizes: Sizes, backend: str) -> tuple[nn.Module, Step]:
    """A unit a block, all compiled: the units' hooks break the graph in the loop, so that the head is eager code."""
    model = gpt_model(sizes)
    run = torch.compile(sharded(sizes, model, model.blocks), backend=backend)
    return deferring(model, backend), keeping(run)


def titan(sizes: Sizes, backend: str) -> tuple[nn.Module, Step]:
    """torchtitan's arrangement: blocks compiled, head eager, loss compiled."""
    model = gpt_model(sizes)
    for block in model.blocks:
        block.compile(backend=backend)
    sharded(sizes, model, model.blocks)
    loss = torch.compile(cross_entropy, backend=backend)
    return deferring(model, backend), lambda x, y: loss(model(x), y)


def qwen3(sizes: Sizes, backend: str) -> tuple[nn.Module, Step]:
    """Random weights, layers compiled; head and loss are the library's eager code."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = SIZES["tiny" if sizes.tiny else "0.6B"]
    config = Qwen3Config(**size, max_position_embeddings=sizes.length, use_cache=False)
    with torch.device(sizes.device):
        model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        layer.compile(backend=backend)
    sharded(sizes, model, model.model.layers)
    return deferring(model, backend), lambda x, y: model(input_ids=x, labels=x).loss


def deferring(model: nn.Module, backend: str) -> nn.Module:
    if backend == "fusedhead":
        fusedhead.defer(model)
    return model


GPT: dict[str, Make] = {
    "DDP, loss inside": ddp_inside,
    "DDP, loss outside": ddp_outside,
    "FSDP2, one unit, loss inside": fsdp_inside,
    "FSDP2, blocks compiled, eager head": titan,
    "FSDP2, a unit a block, loss inside": fsdp_by_block,
    "FSDP2, one unit, loss outside": fsdp_outside,
    "FSDP2, one unit resharded, loss inside": fsdp_resharded,
}
QWEN3: dict[str, Make] = {"Qwen3 0.6B, FSDP2": qwen3}

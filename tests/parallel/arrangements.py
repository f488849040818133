"""Arrangements of a tensor-parallel head, as programs write them; what each rank does in the tests of this folder.

Every program trains the same small model for two steps and is compared with one process: `reference`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from fusedhead.backend import compile_graph
from fusedhead.options import split_options

V, D, BATCH, TIME = 96, 16, 4, 6
STEPS = 2


class Model(nn.Module):
    """A language model with its loss inside."""

    def __init__(self, vocab: int = V, bias: bool = False, loss: Callable[..., Tensor] = F.cross_entropy) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lin, self.norm = nn.Embedding(vocab, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.head, self.loss = nn.Linear(D, vocab, bias=bias), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x)
        z = self.head(self.norm(h + torch.tanh(self.lin(h))))
        return self.loss(z.flatten(0, 1), y.flatten())


class Sequential(nn.Module):
    """One whose tokens lie in shards before the head (SequenceParallel)."""

    def __init__(self, vocab: int = V, loss: Callable[..., Tensor] = F.cross_entropy) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(vocab, D), nn.LayerNorm(D)
        self.head, self.loss = nn.Linear(D, vocab, bias=False), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.head(self.norm(self.embed(x))).flatten(0, 1), y.flatten())


def data(vocab: int, ignored: float) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    x, y = (torch.randint(0, vocab, (BATCH, TIME), generator=g) for _ in range(2))
    return x, torch.where(torch.rand(y.shape, generator=g) < ignored, -100, y)


def whole(x: Any) -> Tensor:
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def compiled(model: nn.Module, records: list[Any]) -> Callable[..., Any]:
    own, _ = split_options({"fusedhead.min_logits": 1, "fusedhead.shards": True})

    def backend(gm: Any, inputs: Any) -> Any:
        return compile_graph(gm, inputs, own, aot_eager, lambda report: records.extend(report.heads))

    torch._dynamo.reset()
    return torch.compile(model, backend=backend)  # type: ignore[no-any-return]


def collectives(profile: Any) -> dict[str, int]:
    """How often each collective was called."""
    return dict(Counter(e.name.removeprefix("c10d::") for e in profile.events() if e.name.startswith("c10d::")))


def counted(run: Callable[[], Any], count: bool) -> tuple[Any, dict[str, int]]:
    if not count:  # compiling under a profiler takes long
        return run(), {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    return result, collectives(profile)


def train(
    model: nn.Module,
    vocab: int = V,
    ignored: float = 0.0,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    eager: bool = False,
) -> dict[str, Any]:
    """Losses, first gradients, parameters after two steps, the report, and the collectives of the second step."""
    records: list[Any] = []
    step = model if eager else compiled(model, records)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, foreach=False)
    (x, y), losses, gradients = data(vocab, ignored), [], {}
    forward: dict[str, int] = {}
    backward: dict[str, int] = {}
    for at in range(STEPS):
        with around():
            loss, forward = counted(partial(step, x, y), at > 0 and not eager)
            _, backward = counted(loss.backward, at > 0 and not eager)
        if at == 0:
            gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(whole(loss))
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "parameters": {name: whole(p) for name, p in model.named_parameters()},
        "heads": [(head.fused, head.reason, head.vocab_size, head.tokens) for head in records],
        "forward": forward,
        "backward": backward,
    }


def reference(kind: type[nn.Module], dtype: torch.dtype, vocab: int = V, ignored: float = 0.0, **model: Any) -> Any:
    """The same by one process in eager mode."""
    return train(kind(vocab=vocab, **model).to(dtype), vocab, ignored, eager=True)


def tp_mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def colwise(
    vocab: int = V, ignored: float = 0.0, output: Any = None, local: bool = False, parallel: bool = True, **model: Any
) -> dict[str, Any]:
    """ColwiseParallel, its logits in shards or gathered, as DTensors or local, the loss under loss_parallel or not."""
    made = Model(vocab, **model)
    style = ColwiseParallel(output_layouts=output or Shard(-1), use_local_output=local)
    parallelize_module(made, tp_mesh(), {"head": style})
    return train(made, vocab, ignored, loss_parallel if parallel else nullcontext)


def sequence_parallel(vocab: int = V) -> dict[str, Any]:
    made = Sequential(vocab)
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(made, tp_mesh(), plan)
    return train(made, vocab, around=loss_parallel)


class ByHand(Model):
    """A weight that the program itself has distributed."""

    def place(self, mesh: Any, placement: Any, end: str) -> None:
        self.mesh, self.end = mesh, end
        self.head.weight = nn.Parameter(distribute_tensor(self.head.weight.detach(), mesh, [placement]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.norm(h + torch.tanh(self.lin(h)))
        z = DTensor.from_local(h, self.mesh, [Replicate()]) @ self.head.weight.t()
        z = z.full_tensor() if self.end == "full_tensor" else z.redistribute(self.mesh, [Replicate()]).to_local()
        return self.loss(z.flatten(0, 1), y.flatten())


def by_hand(placement: Any, end: str = "to_local", vocab: int = V) -> dict[str, Any]:
    made = ByHand(vocab)
    made.place(tp_mesh(), placement, end)
    return train(made, vocab)


def fsdp(shape: tuple[int, int], vocab: int = V) -> dict[str, Any]:
    """FSDP2 over one dimension of a mesh, tensor parallelism over the other; all data on every rank."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    made = Model(vocab)
    parallelize_module(made, mesh["tp"], {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)})
    fully_shard(made, mesh=mesh["dp"])
    return train(made, vocab, around=loss_parallel)


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float() / 2, y, label_smoothing=0.1)


def total(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum") / 7


def everything(z: Tensor, y: Tensor) -> Tensor:
    """lse and its square, the label's logit, the sum, the entropy, and where the maximum is."""
    log_p = F.log_softmax(z, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    right = (z.argmax(-1) == y).float().mean()
    loss = F.cross_entropy(z, y, label_smoothing=0.1)
    return loss + 1e-2 * (z.logsumexp(-1) ** 2).mean() + 0.1 * entropy.mean() + right


LOCAL = {"output": Replicate(), "local": True, "parallel": False}
# name: (what the ranks run, what one process runs: the model, and how)
ARRANGEMENTS: dict[str, tuple[Callable[[], Any], type[nn.Module], dict[str, Any]]] = {
    "colwise, loss_parallel": (colwise, Model, {}),
    "bias": (partial(colwise, bias=True), Model, {"bias": True}),
    "ignore_index": (partial(colwise, ignored=0.3), Model, {"ignored": 0.3}),
    "V not divisible": (partial(colwise, vocab=97), Model, {"vocab": 97}),
    "sum": (partial(colwise, loss=total), Model, {"loss": total}),
    "gathered, local": (partial(colwise, **LOCAL), Model, {}),
    "gathered, bias, V not divisible": (
        partial(colwise, vocab=97, bias=True, **LOCAL), Model, {"vocab": 97, "bias": True},
    ),
    "label smoothing, a temperature": (partial(colwise, loss=smoothed, **LOCAL), Model, {"loss": smoothed}),
    "every statistic": (partial(colwise, loss=everything, **LOCAL), Model, {"loss": everything}),
    "sequence parallel": (sequence_parallel, Sequential, {}),
    "by hand, Shard(0), to_local": (partial(by_hand, Shard(0)), Model, {}),
    "by hand, Shard(0), full_tensor": (partial(by_hand, Shard(0), "full_tensor"), Model, {}),
    "by hand, Replicate": (partial(by_hand, Replicate()), Model, {}),
    "by hand, Shard(1)": (partial(by_hand, Shard(1)), Model, {}),
    "FSDP2 x TP, (1, 2)": (partial(fsdp, (1, 2)), Model, {}),
    "FSDP2 x TP, (2, 1)": (partial(fsdp, (2, 1)), Model, {}),
}  # fmt: skip


def every_arrangement() -> dict[str, Any]:
    """Run on each rank. What raises is returned as text."""
    found: dict[str, Any] = {}
    for name, (run, _, _) in ARRANGEMENTS.items():
        try:
            found[name] = run()
        except Exception as error:
            import traceback

            found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
    return found

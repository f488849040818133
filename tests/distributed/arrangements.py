"""Two steps of training on each of two gloo ranks, arranged as programs arrange them, and on one process in eager.

`every_arrangement` runs on a rank (`tests.functional.ranks`). It must not know what is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import fusedhead
from fusedhead.report import observers
from fusedhead.report.summary import Summary
from tests.eager_stack import backend

V, D, B, T = 1024, 16, 4, 32
STEPS = 2
Step = Callable[[Any, Tensor, Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, returns: str = "logits") -> None:
        super().__init__()
        self.returns = returns
        self.embed, self.block, self.unused = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        h = self.embed(x)
        z = self.head(self.norm(h + torch.tanh(self.block(h))))
        loss = F.cross_entropy(z.flatten(0, 1), y.flatten()) if self.returns == "both" else None
        return (z, loss) if loss is not None else z


def outside(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x, y).flatten(0, 1), y.flatten())


def inside(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return model(x, y)[1]


def read_by_one(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """The loss of the model, and a read of the returned logits on rank 0 alone, after the backward."""
    logits, loss = model(x, y)
    if dist.get_rank() == 0:
        expected = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        assert abs(float(expected.detach() - loss.detach())) < 1e-5
        logits.detach().sum().item()
    return loss


def read_after(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """A loss whose logits are read on rank 0 when the backward has ended."""
    logits = model(x, y)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    if dist.get_rank() == 0:
        assert logits.detach().argmax(-1).shape == y.shape
    return loss.detach().requires_grad_()


def train(model: Any, parameters: Any, step: Step, x: Tensor, y: Tensor, micro: int = 1) -> list[Tensor]:
    """The losses of the steps, in plain gradient descent."""
    losses = []
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in range(micro):
            loss = step(model, x[part::micro], y[part::micro]) / micro
            if loss.grad_fn is not None and loss.grad_fn.next_functions:
                loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return losses


def fsdp(model: Model, units: Any = (), root: Any = None, rest: Any = None, policy: Any = None) -> Model:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    more = {"mp_policy": policy} if policy is not None else {}
    for unit in units:
        fully_shard([getattr(model, n) for n in unit] if isinstance(unit, tuple) else getattr(model, unit), mesh=mesh,
                    reshard_after_forward=rest, **more)  # fmt: skip
    fully_shard(model, mesh=mesh, reshard_after_forward=root, **more)
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend=backend(observers.notify))


def eager(model: Any) -> Any:
    return fusedhead.defer(model)


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# name: what the model returns, how it is wrapped, how a step is taken
ARRANGEMENTS: dict[str, tuple[str, Callable[[Model], Any], Step]] = {
    "ddp": ("logits", lambda m: compiled(DDP(m)), outside),
    "ddp find_unused": ("logits", lambda m: compiled(DDP(m, find_unused_parameters=True)), outside),
    "ddp static_graph": ("logits", lambda m: compiled(DDP(m, static_graph=True)), outside),
    "ddp find_unused, compiled inside": ("logits", lambda m: DDP(compiled(m), find_unused_parameters=True), outside),
    "ddp find_unused, eager": ("logits", lambda m: DDP(eager(m), find_unused_parameters=True), outside),
    "fsdp returned, unread": ("both", lambda m: compiled(fsdp(m)), inside),
    "fsdp returned, unread, resharded": ("both", lambda m: compiled(fsdp(m, root=True)), inside),
    "fsdp returned, block apart": ("both", lambda m: compiled(fsdp(m, ["block"])), inside),
    "fsdp returned, read by one rank": ("both", lambda m: compiled(fsdp(m, root=True)), read_by_one),
    "fsdp outside": ("logits", lambda m: compiled(fsdp(m)), outside),
    "fsdp outside, resharded": ("logits", lambda m: compiled(fsdp(m, ["block"], root=True)), outside),
    "fsdp outside, compiled before": ("logits", lambda m: fsdp(compiled(m)), outside),
    "fsdp outside, read after the backward": ("logits", lambda m: compiled(fsdp(m, root=True)), read_after),
    "fsdp eager head in the root": ("logits", lambda m: eager(fsdp(m)), outside),
    "fsdp eager head alone": ("logits", lambda m: eager(fsdp(m, ["head"], rest=True)), outside),
    "fsdp eager head alone, kept": ("logits", lambda m: eager(fsdp(m, ["block", "head"], rest=False)), outside),
    "fsdp eager norm and head": ("logits", lambda m: eager(fsdp(m, ["block", ("norm", "head")])), outside),
    "fsdp bf16": ("logits", lambda m: eager(fsdp(m, ["block", ("norm", "head")], policy=BF16)), outside),
}


def one(name: str) -> dict[str, Any]:
    returns, wrap, step = ARRANGEMENTS[name]
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Model(returns)
    plain = copy.deepcopy(model)
    exact = copy.deepcopy(model).double()
    x, y = torch.randint(0, V, (B, T)), torch.randint(0, V, (B, T))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    summary = Summary()
    remove = observers.add(summary.add)
    try:
        wrapped = wrap(model)
        losses = train(wrapped, wrapped.parameters(), step, x[rank::ranks], y[rank::ranks])
    finally:
        remove()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    mean = torch.stack([loss.float() for loss in losses])
    dist.all_reduce(mean)
    one_process = inside if returns == "both" else outside
    return {
        "losses": list(mean / ranks),
        "parameters": [p.detach().float() for p in whole],
        "plain": [*train(plain, plain.parameters(), one_process, x, y), *(p.detach() for p in plain.parameters())],
        "exact": [*train(exact, exact.parameters(), one_process, x, y), *(p.detach() for p in exact.parameters())],
        "heads": [(h.fused, h.logits, h.reason, h.run.deferred.value, h.run.answered.value, h.run.built.total,
                   h.run.at_once.total, str(h)) for h in summary.heads()],
    }  # fmt: skip


def every_arrangement() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ARRANGEMENTS:
        try:
            found[name] = one(name)
        except Exception as error:
            import traceback

            found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return found

"""Calls that write without looking like it: packets, bodies, buffers, arrays, opaque functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

N, D, V = 6, 4, 11


@torch.library.custom_op("fusedhead_tests::bump", mutates_args={"x"})
def bump(x: Tensor) -> None:
    x.add_(1.0)


@torch.library.custom_op("fusedhead_tests::second", mutates_args={"out"})
def second(x: Tensor, out: Tensor) -> None:
    out.copy_(x * 3)


@torch.library.custom_op("fusedhead_tests::several", mutates_args={"xs"})
def several(xs: list[Tensor]) -> None:
    for x in xs:
        x.mul_(2)


@torch.library.custom_op("fusedhead_tests::pure", mutates_args=())
def pure(x: Tensor) -> Tensor:
    return x * 2


@pure.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch._dynamo.allow_in_graph
def taken_whole(x: Tensor) -> Tensor:
    x.detach().add_(1)
    return x.sum()


@torch._dynamo.allow_in_graph
def taken_whole_and_pure(x: Tensor) -> Tensor:
    return x.sum()


def by_numpy(x: Tensor) -> None:
    array = x.numpy()
    array += 1


def by_numpy_item(x: Tensor) -> None:
    x.numpy()[0] = 5


class Writes(torch.autograd.Function):
    """The first argument; writes to the second in the forward."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, x: Tensor) -> Tensor:
        x.mul_(2)
        return p * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g, None


class Keeps(torch.autograd.Function):
    """The first argument; keeps the second for the backward, which those below write each in their own way."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return p * 1


class WritesInBackward(Keeps):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        ctx.saved_tensors[0].mul_(2)
        return g * 1, None


class WritesToItsGradient(Keeps):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g.clone().mul_(2) + 0 * ctx.saved_tensors[0].sum(), None


@torch._dynamo.allow_in_graph
def taken_whole_with_a_backward(p: Tensor, x: Tensor) -> Tensor:
    return WritesInBackward.apply(p, x)


@torch.compiler.nested_compile_region
def nested(x: Tensor) -> Tensor:
    return x.mul_(2).sum()


def labels() -> Tensor:
    return torch.randint(0, V, (N,))


OPS = torch.ops.fusedhead_tests
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "packet": lambda x: OPS.bump(x),
    "overload": lambda x: OPS.bump.default(x),
    "packet, an argument that is not the first": lambda x: OPS.second(torch.ones_like(x), x),
    "packet, by name": lambda x: OPS.second(out=x, x=torch.ones_like(x)),
    "packet, in a list": lambda x: OPS.several([torch.ones(3), x]),
    "packet of aten": lambda x: torch.ops.aten.add_(x, 1),
    "method": lambda x: x.add_(1),
    "dunder": lambda x: x.__iadd__(1),
    "operator": lambda x: x.__imul__(x),
    "item": lambda x: x.__setitem__((slice(None), 0), 3.0),
    "out": lambda x: torch.add(torch.ones_like(x), 1, out=x),
    "out of several": lambda x: torch.max(torch.ones(N, D, 2), -1, out=(x, torch.empty(N, D, dtype=torch.long))),
    "inplace": lambda x: F.relu(x, inplace=True),
    "inplace, by position": lambda x: F.hardtanh(x, -0.1, 0.1, True),
    "list": lambda x: torch._foreach_add_([torch.ones(2), x], 1.0),
    "view": lambda x: x.view(-1).add_(1),
    "data": lambda x: x.data.add_(1),
    "detached": lambda x: x.detach().add_(1),
    "strided": lambda x: torch.as_strided(x, (2,), (1,), 1).add_(1),
    "piece": lambda x: x.unbind()[1].zero_(),
    "split": lambda x: [p.mul_(3) for p in x.split(2)],
    "chunks in a list": lambda x: torch._foreach_mul_(x.chunk(2), 3.0),
    "expanded": lambda x: x.expand(2, N, D)[0].add_(1),
    "init": lambda x: torch.nn.init.constant_(x, 0.5),
    "embedding": lambda x: F.embedding(torch.arange(3), x, max_norm=0.1),
    "optimizer": lambda x: torch._fused_sgd_([x], [torch.ones_like(x)], [], weight_decay=0.0, momentum=0.0, lr=0.1,
                                             dampening=0.0, nesterov=False, maximize=False, is_first_step=True),
    "checkpoint": lambda x: checkpoint(lambda a: a.mul_(2).sum(), x, use_reentrant=False),
    "cond": lambda x: torch.cond(torch.ones(()) > 0, lambda a: a.mul_(2).sum(), lambda a: a.sum(), (x,)),
    "nested": nested,
    "numpy": by_numpy,
    "numpy item": by_numpy_item,
    "taken whole": lambda x: taken_whole(x),
}  # fmt: skip

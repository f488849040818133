"""Every operator of torch's own database, with its own sample inputs, beside and between a head and its loss.

| place      | the program                                                                                   |
|------------|-----------------------------------------------------------------------------------------------|
| beside     | a loss, and the op of tensors that have nothing to do with it                                 |
| on logits  | a loss of the logits, and the op of them                                                      |
| between    | a loss of what the op makes of the logits                                                     |
| hidden     | a loss of the projection of what the op makes of hidden states                                |
| losses     | the op of the tokens' losses                                                                  |
| outside    | as "on logits", with the logits returned by the compiled model and the rest in eager code      |

The logits have the shape and, up to rounding, the values of the sample's first tensor, so that whatever an op expects
(a positive definite matrix, numbers above one) is what it gets. This file draws programs and compares nothing.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from tests.op_samples import first_samples

PLACES = ("beside", "on logits", "between", "hidden", "losses", "outside")
D, V = 7, 11
# made for tests of torch itself, or of another layout than a head can meet
LEFT_OUT = ("_refs.", "sparse.", "jiterator", "nonzero_static", "to_sparse")


@dataclass(frozen=True)
class Case:
    """A program: ``run(*inputs)`` gives a tree of results; ``model`` is the part that is compiled."""

    name: str  # "op/sample/place"
    inputs: tuple[Tensor, ...]  # those that are floating require gradients
    model: Callable[..., Any]
    rest: Callable[..., Any] | None = None  # eager code behind it: of its result and the inputs
    dynamic: bool = False  # whether the first size of the first input is a symbol to the compiler


def ops() -> list[Any]:
    return [op for op in op_db if torch.float32 in op.supported_dtypes("cpu") and not op.name.startswith(LEFT_OUT)]


def composite(op: Any) -> bool:
    """Whether the op is written in terms of others, or a function of Python: what is traced of it is not one op."""
    packet = getattr(torch.ops.aten, op.aten_name or op.name, None)
    try:
        return packet is None or all(
            getattr(packet, name).has_kernel_for_dispatch_key("CompositeImplicitAutograd")
            for name in packet.overloads()
        )
    except RuntimeError:  # an op of TorchScript, which the dispatcher does not know
        return True


def samples(op: Any, most: int) -> Iterator[tuple[int, Any]]:
    """Some of an op's samples, evenly spread, numbered as the database has them."""
    torch.manual_seed(0)
    random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = first_samples(op, torch.float32, 200, requires_grad=False)
    for i in sorted({len(every) * k // most for k in range(most)} if every else ()):
        yield i, every[i]


def learns(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.layout is torch.strided


def projected(values: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight whose product is ``values``, up to rounding: h = values Q, w = Q, Q orthogonal."""
    size = values.shape[-1]
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] if size else torch.zeros(0, 0)
    return (values.double() @ q).to(values.dtype), q.to(values.dtype)


def scored(z: Tensor) -> Tensor:
    """A loss over the last dimension, of labels that hang on nothing."""
    classes = z.shape[-1]
    rows = z.reshape(-1, classes)
    return F.cross_entropy(rows, torch.arange(rows.shape[0], device=z.device) % classes)


def matrix(x: Any) -> bool:
    return learns(x) and x.ndim >= 2 and x.numel() > 0


def cases(op: Any, number: int, sample: Any, places: Sequence[str] = PLACES) -> Iterator[Case]:
    """The programs with one op and one sample."""
    leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    tensors = [x.detach() for x in leaves if isinstance(x, Tensor)]
    run = op.method_variant if number % 2 and op.method_variant and isinstance(sample.input, Tensor) else op.op
    name = op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")

    def apply(inputs: Sequence[Tensor]) -> Any:
        it = iter(inputs)
        first, args, kwargs = tree_unflatten([next(it) if isinstance(x, Tensor) else x for x in leaves], spec)
        return run(first, *args, **kwargs)

    first = next((i for i, x in enumerate(tensors) if learns(x)), None)
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(6, D, generator=generator)
    w = torch.randn(V, D, generator=generator)

    def beside(h: Tensor, w: Tensor, *inputs: Tensor) -> Any:
        return scored(F.linear(h, w)), apply(inputs)

    if "beside" in places:
        yield Case(f"{name}/{number}/beside", (h, w, *tensors), beside)
    if first is None:
        return
    values, others = tensors[first], (*tensors[:first], *tensors[first + 1 :])

    def of(x: Tensor, inputs: Sequence[Tensor]) -> Any:
        return apply((*inputs[:first], x, *inputs[first:]))

    def on_logits(h: Tensor, w: Tensor, *inputs: Tensor) -> Any:
        z = F.linear(h, w)
        return scored(z), of(z, inputs)

    def between(h: Tensor, w: Tensor, *inputs: Tensor) -> Any:
        built = tree_leaves(of(F.linear(h, w), inputs))[0]
        return scored(built), built.shape

    def hidden(x: Tensor, w: Tensor, *inputs: Tensor) -> Any:
        built = tree_leaves(of(x, inputs))[0]
        return scored(F.linear(built, w)), built.shape

    def losses(h: Tensor, w: Tensor, *inputs: Tensor) -> Any:
        z = F.linear(h, w)
        each = F.cross_entropy(z, torch.arange(z.shape[0], device=z.device) % V, reduction="none")
        return each.mean(), of(each.view(values.shape), inputs)

    def logits(h: Tensor, w: Tensor, *_: Tensor) -> Tensor:
        return F.linear(h, w)

    def outside(z: Tensor, h: Tensor, w: Tensor, *inputs: Tensor) -> Any:
        return scored(z), of(z, inputs)

    result = outcome(apply, tensors)
    if matrix(values):
        hw = projected(values)
        if "on logits" in places:
            yield Case(f"{name}/{number}/on logits", (*hw, *others), on_logits)
        if "between" in places and matrix(result):
            yield Case(f"{name}/{number}/between", (*hw, *others), between)
        if "outside" in places:
            yield Case(f"{name}/{number}/outside", (*hw, *others), logits, outside)
    if "hidden" in places and matrix(result):
        own = torch.randn(V, result.shape[-1], generator=generator)
        yield Case(f"{name}/{number}/hidden", (values, own, *others), hidden)
    if "losses" in places and values.numel() and values.ndim:
        rows = torch.randn(values.numel(), D, generator=generator)
        yield Case(f"{name}/{number}/losses", (rows, w, *others), losses)


def outcome(apply: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    """The first result of the op by itself, None where it raises."""
    try:
        torch.manual_seed(2)
        return next(iter(tree_leaves(apply([x.clone() for x in tensors]))), None)
    except Exception:
        return None


def fresh(case: Case, disturbed: int = 0) -> tuple[Tensor, ...]:
    """The inputs as leaves of a new step; ``disturbed``: the seed of a relative change in the last place."""

    def one(x: Tensor) -> Tensor:
        copy = x.detach().clone()
        if disturbed and learns(x):
            generator = torch.Generator().manual_seed(disturbed)
            noise = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
            copy = (copy * (1 + 2 * torch.finfo(x.dtype).eps * noise.to(x.dtype))).to(x.dtype)
        return copy.requires_grad_() if learns(x) else copy

    return tuple(tree_map(one, list(case.inputs)))

"""What each rank does in `test_vocab_parallel`: one head in shards, and what comes of it."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fusedhead
from fusedhead.functional.vocab_parallel import bounds
from tests.functional.test_linear_cross_entropy import FORMS, given

V = 96
SPLITS = {"even": None, "uneven": (5, 50, 7, 34), "an empty shard": (60, 0, 30, 6)}


SENT = {  # what is counted, by the names of this torch: how it is called here, and the argument that goes in
    "all_reduce": ("all_reduce", 0),
    "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor": ("all_gather", 1),
}


class Collectives:
    """Which collectives were called, and how many bytes of this rank's went in."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __enter__(self) -> Collectives:
        self.real = {name: getattr(dist, name) for name in SENT}
        for name, (called, at) in SENT.items():
            setattr(dist, name, partial(self.counted, self.real[name], called, at))
        return self

    def counted(self, real: Any, called: str, at: int, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((called, args[at].numel() * args[at].element_size()))
        return real(*args, **kwargs)

    def __exit__(self, *_: Any) -> None:
        for name, real in self.real.items():
            setattr(dist, name, real)


def span(split: tuple[int, ...] | None) -> tuple[int, int]:
    """The classes of this rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if split is None:
        return bounds(V, ranks, rank)
    sizes = (*split[: ranks - 1], V - sum(split[: ranks - 1]))
    return sum(sizes[:rank]), sum(sizes[: rank + 1])


def outcome(form: dict[str, Any], split: tuple[int, ...] | None, seed: int, dtype: Any = torch.float32) -> Any:
    """Loss, gradient of the hidden states, and gradients of this rank's rows, with the collectives it took."""
    operands = given(seed, bias=True)
    if "ignore_index" in form:
        operands["target"] = operands["target"].clamp(min=0)
    first, last = span(split)
    h = operands["input"].detach().to(dtype).requires_grad_()
    w, b = (operands[k].detach()[first:last].to(dtype).requires_grad_() for k in ("linear_weight", "bias"))
    size = {"vocab_size": V} if split is None else {}
    with Collectives() as forward:
        loss = fusedhead.linear_cross_entropy(h, w, operands["target"], bias=b, group=dist.group.WORLD, **size, **form)
    with Collectives() as backward:
        (loss * torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape)).sum().backward()
    grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in (h, w, b)]
    return [loss.detach(), *grads, forward.calls, backward.calls, (first, last)]


def every_form() -> dict[str, Any]:
    results = {}
    for name, split in SPLITS.items():
        for i, form in enumerate(FORMS):
            results[f"{name}/{i}"] = outcome(form, split, 3)
    results["twice"] = outcome({}, None, 3)
    results["bfloat16"] = outcome({}, None, 3, torch.bfloat16)
    return results


def few_classes() -> Any:
    """A head of 9 classes, of which four ranks hold 3, 3, 3 and none."""
    operands = given(3)
    first, last = bounds(9, dist.get_world_size(), dist.get_rank())
    h, y = operands["input"].detach().requires_grad_(), operands["target"] % 9
    w = operands["linear_weight"].detach()[first:last].requires_grad_()
    loss = fusedhead.linear_cross_entropy(h, w, y, group=dist.group.WORLD, vocab_size=9)
    loss.backward()
    return [loss.detach(), h.grad, w.grad]


def compiled() -> Any:
    """The same under torch.compile: the collectives are part of one graph."""
    operands = given(3)
    first, last = span(None)
    h, w = operands["input"], operands["linear_weight"].detach()[first:last].requires_grad_()

    def step(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return fusedhead.linear_cross_entropy(h, w, y, group=dist.group.WORLD, vocab_size=V)

    loss = torch.compile(step, backend="aot_eager")(h, w, operands["target"])
    loss.backward()
    return [loss.detach(), h.grad, w.grad, (first, last)]


def mistakes() -> dict[str, str]:
    """What each rank reads where the ranks do not fit together: always an error, on all of them."""
    rank, result = dist.get_rank(), {}
    operands = given(3)
    first, last = span(None)
    h, w, y = operands["input"].detach(), operands["linear_weight"].detach()[first:last], operands["target"]
    of = {"group": dist.group.WORLD}
    calls = {
        "hidden size": lambda: fusedhead.linear_cross_entropy(h, w[:, 1:] if rank else w, y, **of),
        "reduction": lambda: fusedhead.linear_cross_entropy(h, w, y, reduction="sum" if rank else "mean", **of),
        "smoothing": lambda: fusedhead.linear_cross_entropy(h, w, y, z_loss=0.1 * rank, **of),
        "vocab_size": lambda: fusedhead.linear_cross_entropy(h, w[rank:], y, vocab_size=V, **of),
        "a group of half as many ranks": lambda: fusedhead.linear_cross_entropy(h, w, y, vocab_size=2 * V, **of),
        "memory": lambda: fusedhead.linear_cross_entropy(h, w, y, vocab_size=V, memory=rank + 1, **of),
        "gradients": lambda: fusedhead.linear_cross_entropy(h.clone().requires_grad_(rank == 0), w, y, **of),
        "label": lambda: fusedhead.linear_cross_entropy(h, w, y + V, **of),
    }
    for name, call in calls.items():
        try:
            call()
            result[name] = "no error"
        except Exception as error:
            result[name] = f"{type(error).__name__}: {re.sub(r'at 0x[0-9a-f]+', '', str(error))}"
    return result

"""Modes: ways to run a function of tensors, and which of them a compiled function cannot be first called in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


def in_a_thread(run: Callable[..., Any], *tensors: Tensor) -> Any:
    results: list[Any] = []

    def work() -> None:
        try:
            results.append((True, run(*tensors)))
        except Exception as error:
            results.append((False, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    fine, value = results[0]
    if not fine:
        raise value
    return value


def within(*modes: Callable[[], Any]) -> Callable[..., Any]:
    def run_in(run: Callable[..., Any], *tensors: Tensor) -> Any:
        if len(modes) == 1:
            with modes[0]():
                return run(*tensors)
        with modes[0](), modes[1]():
            return run(*tensors)

    return run_in


def counting(*_: Any, **__: Any) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
    return op in (torch.ops.aten.mm.default, torch.ops.aten.exp.default, torch.ops.aten.sin.default)


def selective() -> Any:
    return create_selective_checkpoint_contexts(save_products)


# ways to run a function of tensors
MODES: dict[str, Callable[..., Any]] = {
    "": lambda run, *t: run(*t),
    "no_grad": within(torch.no_grad),
    "enable_grad": within(torch.enable_grad),
    "enable_grad in no_grad": within(torch.no_grad, torch.enable_grad),
    "inference_mode": within(torch.inference_mode),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "checkpoint": lambda run, *t: checkpoint(run, *t, use_reentrant=False),
    "reentrant checkpoint": lambda run, *t: checkpoint(run, *t, use_reentrant=True),
    "selective checkpoint": lambda run, *t: checkpoint(run, *t, use_reentrant=False, context_fn=selective),
    "save_on_cpu": within(torch.autograd.graph.save_on_cpu),
    "counted": within(counting),
    "thread": in_a_thread,
}  # fmt: skip

# a function that is first called under a dispatch mode is never compiled again
COMPILES = ("compiled loss", "loss compiled by another", "through a graph break")
UNCOMPILED = ("counted", "selective checkpoint")

"""Compile the models of programs that never call ``torch.compile``: ``fusedhead run --compile-eager``.

An optimizer's parameters identify the model. When an optimizer is made, every module that holds at least half of its
parameters is watched, and the outermost of them that the program *calls* while gradients are recorded is compiled in
place. (The outermost module need not be called: Lightning calls methods of it, DataParallel calls copies.) Calls
without gradients, evaluation and generation, stay eager, because their shapes change too often. A program that compiles
anything itself is left alone, and a module that cannot be compiled runs as before.
"""

from __future__ import annotations

import functools
import gc
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fusedhead.backend import fusedhead

log = logging.getLogger("fusedhead")

# Wrappers: they call a module inside, or copies of it, which is better compiled alone.
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def watch_optimizers(strict: bool = False) -> Callable[[], None]:
    """Watch every optimizer made from now on. Returns the function that stops it; what is compiled stays
    compiled.

    Until then ``torch._dynamo.config.suppress_errors`` is on, so that a module that does not compile runs eagerly,
    unless ``strict``.
    """
    original = torch.optim.Optimizer.__init__

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        try:
            watch(parameter for group in self.param_groups for parameter in group["params"])
        except Exception:
            log.exception("fusedhead: the models of this optimizer could not be looked for, and stay eager")

    suppressed = torch._dynamo.config.suppress_errors
    torch._dynamo.config.suppress_errors = suppressed or not strict
    torch.optim.Optimizer.__init__ = initialise  # type: ignore[method-assign]

    def stop() -> None:
        torch._dynamo.config.suppress_errors = suppressed
        if torch.optim.Optimizer.__init__ is initialise:
            torch.optim.Optimizer.__init__ = original  # type: ignore[method-assign]

    return stop


def watch(parameters: Iterable[nn.Parameter]) -> None:
    for module in models(parameters):
        attend(module)


def models(parameters: Iterable[nn.Parameter]) -> list[nn.Module]:
    """The modules in memory that hold at least half of the elements of ``parameters``."""
    wanted = {id(parameter): parameter.numel() for parameter in parameters}
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    parents = defaultdict(list)
    for module in alive:
        for child in vars(module).get("_modules", {}).values():
            parents[id(child)].append(module)
    held: dict[int, set[int]] = defaultdict(set)
    by_id = {id(module): module for module in alive}
    for module in alive:
        parameter_ids = {id(p) for p in vars(module).get("_parameters", {}).values()} & wanted.keys()
        if not parameter_ids:
            continue
        stack, seen = [module], set()
        while stack:
            holder = stack.pop()
            if id(holder) not in seen:
                seen.add(id(holder))
                held[id(holder)] |= parameter_ids
                stack += parents[id(holder)]
    half = sum(wanted.values()) / 2
    modules = [by_id[i] for i, parameter_ids in held.items() if sum(wanted[p] for p in parameter_ids) >= half]
    return [m for m in modules if not isinstance(m, WRAPPERS) and not is_a_layer(m) and untouched(m)]


def is_a_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's layers, such as an embedding that holds most of a model. Dynamo skips its
    frames.
    """
    return type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())


def untouched(module: nn.Module) -> bool:
    """Whether the program itself compiles nothing inside or around this module."""
    from torch._dynamo.eval_frame import OptimizedModule

    return not any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in module.modules())


class Attention:
    """A placeholder for a module's compiled call until the module is called while gradients are recorded."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if under_dynamo():  # the program compiles it after all
            release(module)
            return module._call_impl(*args, **kwargs)
        if not torch.is_grad_enabled():
            return module._call_impl(*args, **kwargs)
        release(module)
        compile_in_place(module)
        return module(*args, **kwargs)


_attended: dict[str, None] = {}  # names of the watched models, in order
_compiled: list[str] = []  # names of the compiled ones


def unreached() -> str:
    """The sentence why no model of the program was compiled; "" where one was, or none was found."""
    if _compiled or not _attended:
        return ""
    return (
        f"--compile-eager compiled nothing: it compiles a model when it is called while gradients are recorded, and "
        f"{', '.join(_attended)} never was. One that is used through a method (model.loss(batch), model.forward(x)) is "
        "not called: only its torch.nn.Linear heads are fused"
    )


def attend(module: nn.Module) -> None:
    _attended.setdefault(type(module).__qualname__)
    module._compiled_call_impl = Attention(module)


def release(module: nn.Module) -> None:
    """Stop watching a module and everything inside it."""
    for inner in module.modules():
        if isinstance(inner._compiled_call_impl, Attention):
            inner._compiled_call_impl = None


def compile_in_place(module: nn.Module) -> None:
    """Compile a module as ``module.compile(backend="fusedhead")`` does, for calls that record gradients."""
    compiled = torch.compile(module._call_impl, backend=fusedhead)
    _compiled.append(type(module).__qualname__)
    log.info("fusedhead: %s is compiled", type(module).__qualname__)

    @torch.compiler.disable(recursive=False)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not under_dynamo():
            return compiled(*args, **kwargs)
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = call


def under_dynamo() -> bool:
    """Whether this frame runs inside a function that the program compiles."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)

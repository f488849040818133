"""Names of heads in a profiler's trace and in snapshots of CUDA memory.

While a profiler runs, each op opens a range, ``fusedhead::head_loss lm_head N=8192 D=4096 V=128256``. While the memory
history is recorded, the op is called through a frame of that name, which appears in the stack of each allocation.
Otherwise an op only reads two flags. An op does not know its module: `remember` registers the
modules by the weight's sizes when a graph is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch.autograd import profiler

AnyFunction = Callable[..., Any]
MOST_MODULES = 4  # modules listed in a name
module_names: dict[tuple[int, int], tuple[str, ...]] = {}  # (vocab, hidden) -> modules; replaced by key, never changed


def remember(vocab: int, hidden: int, module: str) -> None:
    """Register that a head of a module has a weight of these sizes."""
    names = module_names.get((vocab, hidden), ())
    if module not in names:
        module_names[vocab, hidden] = (*names, module)


def never() -> bool:
    return False


# Where this torch lacks the name, snapshots show no names.
history_enabled: Callable[[], bool] = getattr(torch._C, "_cuda_isHistoryEnabled", never)


def recording() -> bool:
    """Whether memory history is recorded. Reading that raises where CUDA has no driver, so CUDA is asked for first."""
    return torch.cuda.is_initialized() and history_enabled()


def profiling() -> bool:
    """Whether a profiler runs, by the flag that torch's optimizers read."""
    return getattr(profiler, "_is_profiler_enabled", False)


# The arguments of an op -> its hidden states [N, D] and its weight [V, D].
FindOperands = Callable[[tuple[Any, ...]], tuple[torch.Tensor, torch.Tensor]]


def operands_named(schema: str) -> FindOperands:
    """The arguments h and w of a schema."""
    arguments, _, _ = schema.partition("->")
    names = [argument.partition("=")[0].split()[-1] for argument in arguments.strip(" ()").split(",")]
    at_h, at_w = names.index("h"), names.index("w")
    return lambda args: (args[at_h], args[at_w])


def ranged(op: str, operands: FindOperands, implementation: AnyFunction) -> AnyFunction:
    """Wrap the implementation of an op, which then has a name where names are recorded, with the sizes of h and w."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not (profiling() or recording()):
            return implementation(*args, **kwargs)
        h, w = operands(args)
        name = range_name(op, h.shape[0], *w.shape)
        with torch.profiler.record_function(name):
            return frame(name)(implementation, args, kwargs)

    return run


def range_name(op: str, tokens: int, vocab: int, hidden: int) -> str:
    names = module_names.get((vocab, hidden), ())
    more = ("...",) if len(names) > MOST_MODULES else ()
    which = "|".join((*names[:MOST_MODULES], *more))
    return " ".join(filter(None, (f"fusedhead::{op}", which, f"N={tokens} D={hidden} V={vocab}")))


def _call(implementation: AnyFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return implementation(*args, **kwargs)


@lru_cache(maxsize=256)
def frame(name: str) -> AnyFunction:
    """A copy of `_call` whose frame has a given name."""
    names = {"co_name": name, **({"co_qualname": name} if hasattr(_call.__code__, "co_qualname") else {})}
    return FunctionType(_call.__code__.replace(**names), globals(), name)  # type: ignore[arg-type]

"""The name of a head where a profiler, or a snapshot of CUDA memory, shows its work.

While a profiler runs each op opens a range, ``fusedhead::head_loss lm_head N=8192 D=4096 V=128256``. While the history
of memory is recorded the op is called through a frame of that name, which stands in the stack of each of its
allocations. Otherwise an op costs two flags more on a GPU, one elsewhere. An op knows no modules: those of heads with
its weight's sizes are told when a graph is compiled (`remember`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch.autograd import profiler

AnyFunction = Callable[..., Any]
MOST_MODULES = 4  # that a name lists
module_names: dict[tuple[int, int], tuple[str, ...]] = {}  # (vocab, hidden) -> modules; replaced by key, never changed


def remember(vocab: int, hidden: int, module: str) -> None:
    """A head of this module has a weight of these sizes."""
    known = module_names.get((vocab, hidden), ())
    if module not in known:
        module_names[vocab, hidden] = (*known, module)


def never() -> bool:
    return False


# Where this torch has no such name nothing is named in a snapshot.
history_enabled: Callable[[], bool] = getattr(torch._C, "_cuda_isHistoryEnabled", never)


def recording(operand: torch.Tensor) -> bool:
    """Whether the history of the operand's memory is recorded. Where CUDA has no driver the question itself raises."""
    return operand.is_cuda and history_enabled()


def profiling() -> bool:
    """Whether a profiler runs: a flag that torch's own optimizers read too."""
    return getattr(profiler, "_is_profiler_enabled", False)


def ranged(op: str, schema: str, implementation: AnyFunction) -> AnyFunction:
    """The implementation of an op, with its name where one is asked for. Its operands h and w tell the sizes."""
    arguments, _, _ = schema.partition("->")
    names = [argument.partition("=")[0].split()[-1] for argument in arguments.strip(" ()").split(",")]
    at_h, at_w = names.index("h"), names.index("w")

    def run(*args: Any, **kwargs: Any) -> Any:
        if not (profiling() or recording(args[at_h])):
            return implementation(*args, **kwargs)
        name = range_name(op, args[at_h].shape[0], *args[at_w].shape)
        with torch.profiler.record_function(name):
            return frame(name)(implementation, args, kwargs)

    return run


def range_name(op: str, tokens: int, vocab: int, hidden: int) -> str:
    known = module_names.get((vocab, hidden), ())
    more = ("...",) if len(known) > MOST_MODULES else ()
    which = "|".join((*known[:MOST_MODULES], *more))
    return " ".join(filter(None, (f"fusedhead::{op}", which, f"N={tokens} D={hidden} V={vocab}")))


def _call(implementation: AnyFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return implementation(*args, **kwargs)


@lru_cache(maxsize=256)
def frame(name: str) -> AnyFunction:
    """`_call` whose frame has the name."""
    names = {"co_name": name, **({"co_qualname": name} if hasattr(_call.__code__, "co_qualname") else {})}
    return FunctionType(_call.__code__.replace(**names), globals(), name)  # type: ignore[arg-type]

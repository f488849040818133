"""Compiled windows of token programs: the graphs are traced once, cached, and compiled by Inductor.

A window's function is traced for the shapes that it is first called with, gradients included, on the thread that asks.
Threads that need the same graph wait for one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusedhead.kernels.torch_engine.blocks import cuts

RowFunction = Callable[..., Any]
_MADE: dict[tuple, RowFunction] = {}
_SEEN: set[tuple] = set()  # sizes of what whole windows leave over, by what runs on it
_MAKING = threading.Lock()
PIECES = 8  # of what is left over and not compiled
MOST_MADE = 256  # programs and window shapes remembered


def on_a_thread(function: Callable[[], Any]) -> Any:
    """A function's result on a thread of its own, where no dispatch key is excluded."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


def above_autograd_keys(
    function: Callable[[], Any], otherwise: Callable[[Callable[[], Any]], Any] = on_a_thread
) -> Any:
    """A function's result with autograd's dispatch keys, which are excluded in an op's body: a vjp is traced with them.

    ``otherwise``: what runs it on a torch that has other names for what sets them.
    """
    try:
        keys = autograd_keys()
    except AttributeError:
        return otherwise(function)
    with keys:
        return function()


def autograd_keys() -> AbstractContextManager[object]:
    """Autograd's dispatch keys again. Raises AttributeError where torch has other names for what sets them."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    nothing = torch._C.DispatchKeySet.from_raw_repr(0)
    with torch._C._ForceDispatchKeyGuard(include, nothing), torch._C._AutoDispatchBelowAutograd():
        autograd = torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(include, exclude - autograd)


def _signature(tensors: Sequence[Tensor]) -> tuple:
    return tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors)


def made_once(key: tuple, function: RowFunction, examples: list[Tensor], compiled: bool) -> RowFunction:
    """`traced`, once per key and shapes; threads that ask at the same time wait."""
    key = (*key, compiled, _signature(examples))
    compiled_function = _MADE.get(key)
    if compiled_function is None:
        with _MAKING:
            compiled_function = _MADE.get(key)
            if compiled_function is None:
                if len(_MADE) >= MOST_MADE:
                    _MADE.clear()
                compiled_function = _MADE[key] = traced(function, examples, compiled)
    return compiled_function


def traced(function: RowFunction, examples: list[Tensor], compiled: bool) -> RowFunction:
    """``function`` as a graph of ATen calls, differentiation included, compiled by Inductor where asked."""
    examples = [t.detach() for t in examples]  # examples: what made them, and their .grad, are nobody's business

    def trace() -> Any:
        # on this thread: the dispatch modes of whoever called the op are not entered on a device's own
        with torch.autograd.set_multithreading_enabled(False):
            return make_fx(lambda *flat: function(list(flat)))(*examples)

    graph = above_autograd_keys(trace)
    compiled_function = import_module("torch._inductor").compile(graph, examples) if compiled else graph
    return lambda examples: compiled_function(*examples)


def windows(n: int, tokens: int, key: tuple, compiled: bool) -> Iterator[tuple[slice, bool]]:
    """Windows of at most ``tokens`` rows, and whether each runs compiled.

    Where asked whole windows do; what is left over does from the second time on that as much is left, so that batches
    of ever changing size are not compiled for ever. Until then it goes in small pieces, since calls that are not
    compiled hold more.
    """
    whole = n // tokens * tokens if compiled else 0
    for i in cuts(whole, tokens):
        yield i, True
    left = n - whole
    if compiled and left and (*key, left) in _SEEN:
        yield slice(whole, n), True
        return
    if compiled and left:
        if len(_SEEN) >= MOST_MADE:
            _SEEN.clear()
        _SEEN.add((*key, left))
        tokens = max(1, tokens // PIECES)
    for i in cuts(left, tokens):
        yield slice(whole + i.start, whole + i.stop), False

"""Compilation of token programs: a window's function is traced once per shape, cached, and compiled by Inductor.

The trace includes the gradients and runs on the calling thread. Threads that need the same graph at the same time wait
for the first of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fusedhead.kernels.chips import triton_serves
from fusedhead.kernels.tokenwise.simplify import RowStatistic, simplify
from fusedhead.kernels.torch_engine.blocks import cuts

RowFunction = Callable[..., Any]
_MADE: dict[tuple, RowFunction] = {}
_SEEN: set[tuple] = set()  # (function, size) of partial windows that were met once
_MAKING = threading.Lock()
PIECES = 8  # a partial window that is not compiled runs in pieces of 1 / PIECES of a whole one
RECOMPUTED = {  # Inductor's limits are 4, 8 and 30. Each counts the inputs of a value, row statistics included
    "realize_reads_threshold": 32,
    "realize_acc_reads_threshold": 32,
    "realize_opcount_threshold": 128,
}
UNSPLIT = 2  # rows a multiprocessor from which Inductor splits no sum over a row
MOST_MADE = 256  # entries of _MADE and of _SEEN, which are emptied when full


def on_a_thread(function: Callable[[], Any]) -> Any:
    """The function's result, computed on a new thread, where no dispatch key is excluded."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


def above_autograd_keys(
    function: Callable[[], Any], otherwise: Callable[[Callable[[], Any]], Any] = on_a_thread
) -> Any:
    """The function's result, computed with autograd's dispatch keys, which an op's body excludes and a vjp needs.

    ``otherwise`` runs the function on a torch whose private names for these keys differ.
    """
    try:
        keys = autograd_keys()
    except AttributeError:
        return otherwise(function)
    with keys:
        return function()


def autograd_keys() -> AbstractContextManager[object]:
    """A context that includes autograd's dispatch keys again. Raises AttributeError where torch lacks private names."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    nothing = torch._C.DispatchKeySet.from_raw_repr(0)
    with torch._C._ForceDispatchKeyGuard(include, nothing), torch._C._AutoDispatchBelowAutograd():
        autograd = torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(include, exclude - autograd)


def _signature(tensors: Sequence[Tensor]) -> tuple:
    return tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors)


def made_once(
    key: tuple,
    function: RowFunction,
    examples: list[Tensor],
    compiled: bool,
    rows: int,
    written: tuple[int, ...] = (),
) -> RowFunction:
    """The traced function for this key and these shapes, cached after the first call. Concurrent callers wait."""
    key = (*key, compiled, _signature(examples))
    compiled_function = _MADE.get(key)
    if compiled_function is None:
        with _MAKING:
            compiled_function = _MADE.get(key)
            if compiled_function is None:
                if len(_MADE) >= MOST_MADE:
                    _MADE.clear()
                compiled_function = _MADE[key] = traced(function, examples, compiled, rows, written)
    return compiled_function


def traced(
    function: RowFunction, examples: list[Tensor], compiled: bool, rows: int, written: tuple[int, ...] = ()
) -> RowFunction:
    """``function`` as a graph of ATen calls for a window of ``rows`` rows, its differentiation included; with
    ``compiled`` through Inductor.

    Its last results are not returned, but written into the inputs ``written``, which it does not read.
    """
    examples = [t.detach() for t in examples]  # so that the trace sees neither their history nor their .grad

    def trace() -> Any:
        # autograd must run on this thread: the caller's dispatch modes are not active on a device's autograd thread
        with torch.autograd.set_multithreading_enabled(False):
            return make_fx(lambda *flat: function(list(flat)), tracing_mode="fake")(*examples)

    graph = above_autograd_keys(trace)
    write_into(graph, written)
    if not compiled:
        return lambda examples: graph(*examples)
    on_gpu = next((x.device for x in examples if x.device.type == "cuda"), None)
    options = None if on_gpu is None else gpu_options(on_gpu, rows)
    compile_graph = partial(import_module("torch._inductor").compile, options=options)
    statistics = simplify(graph, [at for at, x in enumerate(examples) if row_statistics_serve(x)])
    if not statistics:
        without = compile_graph(graph, examples)
        return lambda examples: without(*examples)
    with_statistics = compile_graph(graph, [*examples, *row_statistics(statistics, examples)])
    return lambda examples: with_statistics(*examples, *row_statistics(statistics, examples))


def gpu_options(device: torch.device, rows: int) -> dict[str, Any]:
    """Options of Inductor for a window of so many rows.

    A value is computed again for each use rather than written and read in float32. With fewer rows than Inductor
    splits, the max and the sum of a softmax are two passes, which Inductor would choose itself with a warning.
    """
    config = import_module("torch._inductor.config")
    options: dict[str, Any] = dict(RECOMPUTED)
    if rows < UNSPLIT * torch.cuda.get_device_properties(device).multi_processor_count:
        options["online_softmax"] = False
    return {name: value for name, value in options.items() if hasattr(config, name)}


def row_statistics_serve(x: Tensor) -> bool:
    """Whether a kernel computes the row statistics of an input: logits of two bytes on a GPU that Triton serves."""
    rows = x.dim() == 2 and x.stride(1) == 1 and x.dtype in (torch.bfloat16, torch.float16)
    return rows and x.device.type == "cuda" and triton_serves()


def row_statistics(statistics: Sequence[RowStatistic], examples: Sequence[Tensor]) -> list[Tensor]:
    """max and log Σ exp(· - max), [n, 1] each, for every statistic in order."""
    module = import_module("fusedhead.kernels.triton_engine.rows.softmax_statistics")  # Triton may be missing
    by_input: dict[int, list[float]] = {}
    for at, scale in statistics:
        by_input.setdefault(at, []).append(scale)
    found = {at: iter(module.softmax_statistics(examples[at], scales)) for at, scales in by_input.items()}
    return [x for at, _ in statistics for x in next(found[at])]


def write_into(graph: GraphModule, inputs: tuple[int, ...]) -> None:
    """Write the last results of a graph into some of its inputs, in order, instead of returning them."""
    if not inputs:
        return
    (output,) = graph.graph.find_nodes(op="output")
    placeholders = graph.graph.find_nodes(op="placeholder")
    returned = list(output.args[0])
    with graph.graph.inserting_before(output):
        for at, result in zip(inputs, returned[-len(inputs) :]):
            graph.graph.call_function(torch.ops.aten.copy_.default, (placeholders[at], result))
    output.args = (returned[: -len(inputs)],)
    graph.recompile()


def windows(n: int, tokens: int, key: tuple, compiled: bool) -> Iterator[tuple[slice, bool]]:
    """Windows of at most ``tokens`` rows out of ``n``, and whether each runs compiled.

    With ``compiled`` whole windows run compiled. The last, partial window runs compiled from the second time that its
    size occurs: batches whose size changes at every step would otherwise be compiled at every step. The first time it
    runs uncompiled in pieces, because uncompiled calls hold more memory per row.
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

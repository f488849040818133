"""The table of contenders: who computes a head, and how a user would call them.

A contender makes a program for a task (whose attribute `remark`, if any, gives the row a note); everything
slow (imports, compilation) happens there or in the program's first call, never in this module's import.
`Unavailable` and any other error becomes the contender's row: what is not installed or does not run says so
in the table. To add a peer, add a function and a line.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tasks import Program, Task, program_of

LIBRARY_TASKS = ("forward", "train")
serial = itertools.count()


class Unavailable(Exception):
    """Why a contender has no numbers, in words for its row."""


class Contender(NamedTuple):
    name: str
    make: Callable[[Task], Program]
    tasks: tuple[str, ...]  # run by default; others on demand, if the contender can
    about: str


def fresh(program: Program) -> Program:
    """A copy of the program with a code object of its own: no compilation meets another's cache entries."""
    assert isinstance(program, types.FunctionType)
    code = program.__code__.replace(co_name=f"{program.__name__}_{next(serial)}")
    return types.FunctionType(code, program.__globals__, program.__name__, program.__defaults__)


def eager(task: Task) -> Program:
    return program_of(task)


def compiled(backend: str, options: dict[str, Any] | None = None) -> Callable[[Task], Program]:
    def make(task: Task) -> Program:
        return torch.compile(fresh(program_of(task)), backend=backend, options=options, dynamic=False)

    return make


def chunked_by_inductor(task: Task) -> Program:
    """Inductor with its auto-chunker, which is off by default; remarks if it chunked nothing."""
    try:
        from torch._inductor.fx_passes import auto_chunker
    except ImportError as missing:
        raise Unavailable(f"torch {torch.__version__} has no auto_chunker") from missing
    chunk = auto_chunker.chunk
    chunkings: list[bool] = []  # one entry a graph that it was shown: whether it took it

    def counted(graph: Any) -> Any:
        chunkings.append(False)
        graph = chunk(graph)  # raises CantChunk where it refuses
        chunkings[-1] = True
        return graph

    # a graph out of the cache would not be shown to the chunker
    program = compiled("inductor", {"auto_chunker.enable": True, "fx_graph_cache": False})(task)

    def watched(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        auto_chunker.chunk = counted  # type: ignore[assignment]
        try:
            return program(h, w, y)
        finally:
            auto_chunker.chunk = chunk

    watched.remark = lambda: "" if any(chunkings) else "did not fire"  # type: ignore[attr-defined]
    return watched


def core(task: Task) -> Program:
    """torch.nn.functional.linear_cross_entropy, chunked, with the options torch picks itself."""
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy(options=...)")
    if task.per_token:
        return lambda h, w, y: -function(h, w, y, reduction="none", options=options())
    return lambda h, w, y: function(h, w, y, options=options())


def liger(accumulate: torch.dtype | None = None) -> Callable[[Task], Program]:
    def make(task: Task) -> Program:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as function

        if task.per_token:
            return lambda h, w, y: -function(h, w, y, reduction="none", accum_dtype=accumulate)
        return lambda h, w, y: function(h, w, y, accum_dtype=accumulate)

    return make


def cut(filter_eps: str | None) -> Callable[[Task], Program]:
    """cut-cross-entropy; without a filter every tile of the gradient is computed."""

    def make(task: Task) -> Program:
        from cut_cross_entropy import linear_cross_entropy as function

        if task.per_token:
            return lambda h, w, y: -function(h, w, y, reduction="none", filter_eps=filter_eps)
        return lambda h, w, y: function(h, w, y, filter_eps=filter_eps)

    return make


def quack(task: Task) -> Program:
    """quack-kernels in chunks of 4096 tokens; fewer where such a chunk of bfloat16 logits reaches 2 GiB, or where as
    many tokens as the hidden size make its vectors of rows and columns the same to it."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as function

    if task.per_token:
        raise Unavailable("quack-kernels has no per-token loss in chunks")

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        chunk = 4096 if 4096 * w.shape[0] * 2 < 2**31 and h.shape[1] != 4096 else 2048
        return function(h, w, y, chunk_size=chunk, tuned=False)

    return program


# an unfused head, however small, is a failure here, not Inductor's numbers under our name
STRICT = {"fusedhead.strict": True, "fusedhead.min_logits": 0}
ALL = ("forward", "train", "frozen", "per-token")
CONTENDERS = {
    c.name: c
    for c in (
        Contender("eager", eager, ALL, "PyTorch as written"),
        Contender("inductor", compiled("inductor"), LIBRARY_TASKS, "torch.compile"),
        Contender("fusedhead", compiled("fusedhead", STRICT), ALL, 'torch.compile(backend="fusedhead")'),
        Contender(
            "fusedhead min",
            compiled("fusedhead", {**STRICT, "fusedhead.memory": "min"}),
            ("train", "per-token"),
            'the same with options={"fusedhead.memory": "min"}',
        ),
        Contender(
            "fusedhead float8",
            compiled("fusedhead", {**STRICT, "fusedhead.gradients": "float8"}),
            ("train",),
            'the same with options={"fusedhead.gradients": "float8"}',
        ),
        Contender(
            "inductor+chunker",
            chunked_by_inductor,
            ("train",),
            "torch.compile with auto_chunker.enable",
        ),
        Contender("linear_cross_entropy", core, LIBRARY_TASKS, "F.linear_cross_entropy(options=...)"),
        Contender("liger", liger(), LIBRARY_TASKS, "liger-kernel"),
        Contender("liger fp32", liger(torch.float32), (), "liger-kernel, accum_dtype=float32"),
        Contender("cce", cut("high"), LIBRARY_TASKS, "cut-cross-entropy"),
        Contender("cce exact", cut(None), ("train",), "cut-cross-entropy without its filter"),
        Contender("quack", quack, LIBRARY_TASKS, "quack-kernels"),
    )
}

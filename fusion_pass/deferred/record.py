"""Records a call: deferred logits for its result, with layout, program and sources.

Layout and program are cached by the call's form, so that the next batch finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedhead.deferred.call_program import CallProgram, CallStep, Const, Container, Leaf, Made, Mode, encode
from fusedhead.deferred.history import with_grad_fn
from fusedhead.deferred.query import LEARNT, NotRecorded, Request
from fusedhead.deferred.row_picks import Pick, Picks
from fusedhead.deferred.state import DeferredState, Same, snapshot
from fusedhead.deferred.tensor import DeferredLogits


def record(request: Request) -> Any:
    """Deferred logits for the result."""
    call, graph_output = request.recorded, request.graph_output
    key = (request.what, tuple(
        t._deferred.layout if isinstance(t, DeferredLogits) else (t.shape, t.stride(), t.dtype, t.requires_grad)
        for t in call.tensors
    ))  # fmt: skip
    entry = graph_output.recorded.get(key)
    if entry is None:
        try:
            layouts, many = call.layouts()
        except Exception as error:
            raise NotRecorded from error
        with graph_output.lock:
            if len(graph_output.recorded) > LEARNT:
                graph_output.recorded.clear()
            entry = graph_output.recorded.setdefault(key, (programs_of(request, layouts, many), layouts, many))
    programs, layouts, many = entry
    if isinstance(many, Same):
        return call.tensors[many.at]
    leaves, snapshots, shared = tuple(request.leaves), tuple(request.snapshots), request.subjects[0]._deferred.shared
    parts = [None] if many is None else range(len(programs))
    results = [
        with_grad_fn(DeferredState(graph_output, program, leaves, snapshots, call, part, shared, layout))
        for part, program, layout in zip(parts, programs, layouts)
    ]
    for subject in request.subjects[1:]:
        for result in results:  # a write to another head's logits concerns it too
            subject._deferred.shared.join(result)
    return results[0] if many is None else many(results)


def pick(request: Request, rows: Picks) -> Any:
    """Deferred logits for rows picked by number, read as a choice by a tensor of numbers."""
    call, graph_output, before = request.recorded, request.graph_output, request.subjects[0]._deferred
    key = ("layouts", call.func, call.args, call.kwargs, call.mode.grad, before.layout)
    entry = graph_output.recorded.get(key)
    if entry is None:
        try:
            entry = graph_output.recorded[key] = ((), *call.layouts())
        except Exception as error:
            raise NotRecorded from error
    _, layouts, many = entry
    results = []
    for part, (chosen, layout) in enumerate(zip(rows, layouts)):
        numbers = [index(pick.rows, before.leaves[0].device) for pick in chosen]
        form = ("rows", before.program, call.mode, tuple((pick.dim, pick.drop) for pick in chosen))
        entry = graph_output.recorded.get(form)
        if entry is None:
            program = picking(before.program, len(before.leaves), chosen, call.mode)
            entry = graph_output.recorded.setdefault(form, ((program,), [], None))
        results.append(with_grad_fn(DeferredState(
            graph_output, entry[0][0], (*before.leaves, *numbers), (*before.snapshots, *map(snapshot, numbers)), call,
            None if many is None else part, before.shared, layout,
        )))  # fmt: skip
    return results[0] if many is None else many(results)


def programs_of(request: Request, layouts: Sequence[Any], many: Any) -> tuple[CallProgram, ...]:
    """The programs of the results; the same ones for the same call on tensors of other sizes."""
    same = request.graph_output.recorded.get((request.what, len(layouts)))
    if same is not None:
        return same[0]
    steps, _ = request.steps()
    last = len(steps) - 1
    programs = tuple(CallProgram(tuple(steps), Made(last, None if many is None else i)) for i in range(len(layouts)))
    request.graph_output.recorded[request.what, len(layouts)] = (programs, [], many)
    return programs


def index(rows: range, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # they are saved for gradients of what is picked
        return torch.arange(rows.start, rows.stop, rows.step, device=device)


def picking(before: CallProgram, leaves: int, chosen: Sequence[Pick], mode: Mode) -> CallProgram:
    """``before``, and then the rows that leaves from number ``leaves`` on hold the numbers of."""
    steps, at = list(before.steps), before.result
    none = encode({}, lambda _: Leaf(0))

    def add(func: Any, *args: Any) -> Made:
        code = Container(tuple, tuple(a if isinstance(a, (Leaf, Made)) else Const(int, a) for a in args))
        steps.append(CallStep(func, code, none, mode))
        return Made(len(steps) - 1)

    for i, pick in enumerate(chosen):
        at = add(Tensor.index_select, at, pick.dim, Leaf(leaves + i))
    for pick in reversed(chosen):
        if pick.drop:
            at = add(Tensor.squeeze, at, pick.dim)
    return CallProgram(tuple(steps), at)

"""The derivative of a `Transform`, in place on one window of the logits.

`record` applies the chain and keeps what its derivative needs (the tape); `pull_back` turns the gradient
with respect to the transformed window into the gradient with respect to h @ w.T, and adds what belongs to
the column and row vectors. Both reuse the buffers they are given: the number of windows held at once is
`windows_held`, which the planner counts against the memory budget. It must not know about heads, rows
statistics or devices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedhead.kernels.transform import native, pointwise
from fusedhead.kernels.transform.transform import CURVED, UNARY, WITH_CONSTANT, WITH_VECTOR, Transform

Tape = list[Tensor]


def _on_tape(op: str, need_cols: bool, need_rows: bool) -> bool:
    """Whether a step's derivative reads a window: its output (tanh, sigmoid) or its input (a function's, a
    multiplier's own).
    """
    return op in CURVED or (op == "mulcol" and need_cols) or (op == "mulrow" and need_rows)


def windows_held(transform: Transform, need_cols: bool, need_rows: bool) -> int:
    """How many windows `record` leaves alive, the transformed one included."""
    return 1 + sum(_on_tape(op, need_cols, need_rows) for op, _ in transform.steps)


def windows_passing(transform: Transform) -> int:
    """How many windows a step holds at most while it is taken, or taken back, besides those on the tape."""
    functions = [pointwise.parse(str(value)) for op, value in transform.steps if op == "fn"]
    return max((pointwise.most_alive(code) for function in functions for code in function.codes), default=0)


def _operand(op: str, value: float | int | str) -> tuple[float, int]:
    """(the constant, the index of the vector) of a step; the one that it does not have is 0."""
    return (float(value) if op in WITH_CONSTANT else 0.0), (int(value) if op in WITH_VECTOR else 0)


def record(
    transform: Transform, z: Tensor, cols: Tensor, rows: Tensor, need_cols: bool, need_rows: bool
) -> tuple[Tensor, Tape]:
    """Transform the window z [m, v] and keep the tape. ``z`` is overwritten.

    cols [C, v] and rows [R, m] are the slices that belong to this window, in the dtype of z.
    """
    tape: Tape = []
    for op, value in transform.steps:
        c, k = _operand(op, value)
        if op == "round":
            continue
        kept = _on_tape(op, need_cols, need_rows)
        if op in UNARY:
            z = z.tanh_() if op == "tanh" else z.sigmoid_()
            tape.append(z)
            z = z.clone()
            continue
        if op == "fn":
            tape.append(z)
            z = native.value(pointwise.parse(str(value)), z, cols, rows)
            z = z.clone() if z.data_ptr() == tape[-1].data_ptr() or not z.is_contiguous() else z
            continue
        if kept:
            tape.append(z)
            z = z.clone()
        if op == "mul":
            z.mul_(c)
        elif op == "add":
            z.add_(c)
        elif op == "addcol":
            z.add_(cols[k])
        elif op == "mulcol":
            z.mul_(cols[k])
        elif op == "setcol":
            torch.where(cols[k].isnan(), z, cols[k], out=z)
        elif op == "dropcol":
            z.masked_fill_(cols[k] != 0, -math.inf)
        elif op == "addrow":
            z.add_(rows[k][:, None])
        elif op == "mulrow":
            z.mul_(rows[k][:, None])
    return z, tape


def pull_back(
    transform: Transform,
    dz: Tensor,
    tape: Tape,
    cols: Tensor,
    rows: Tensor,
    dcols: Tensor | None,
    drows: Tensor | None,
) -> Tensor:
    """The gradient with respect to the raw window, in the buffer of ``dz`` [m, v]. The tape is used up.

    ``dcols`` [C, v] and ``drows`` [R, m] are added to; None for those not needed.
    """
    for op, value in reversed(transform.steps):
        c, k = _operand(op, value)
        if op == "mul":
            dz.mul_(c)
        elif op == "tanh":
            t = tape.pop()
            dz.mul_(t.mul_(t).neg_().add_(1))  # 1 - t²
        elif op == "sigmoid":
            s = tape.pop()
            dz.mul_(s.addcmul_(s, s, value=-1))  # s - s²
        elif op == "fn":
            dz.copy_(native.gradient(pointwise.parse(str(value)), dz, tape.pop(), cols, rows))
        elif op == "addcol" and dcols is not None:
            dcols[k] += dz.sum(0)
        elif op == "addrow" and drows is not None:
            drows[k] += dz.sum(1)
        elif op == "mulcol":
            if dcols is not None:
                dcols[k] += tape.pop().mul_(dz).sum(0)
            dz.mul_(cols[k])
        elif op == "setcol":
            dz.masked_fill_(cols[k].isnan().logical_not_(), 0)
        elif op == "dropcol":
            dz.masked_fill_(cols[k] != 0, 0)
        elif op == "mulrow":
            if drows is not None:
                drows[k] += tape.pop().mul_(dz).sum(1)
            dz.mul_(rows[k][:, None])
    return dz

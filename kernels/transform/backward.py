"""The derivative of a `Transform`, in place on one window of the logits.

`apply_and_record` applies the steps and saves on a tape the windows that their derivatives read. `pull_back` turns the
gradient of the transformed window into the gradient of h @ w.T and adds up the gradients of the column and row vectors.
Both work in place; `windows_held` and `windows_passing` tell the planner how many windows are alive at once.
"""

from __future__ import annotations

from torch import Tensor

from fusedhead.kernels.transform import pointwise
from fusedhead.kernels.transform.transform import Transform

Tape = list[Tensor]


def windows_held(transform: Transform, need_cols: bool, need_rows: bool) -> int:
    """The number of windows alive after `apply_and_record`: the tape's and the transformed one."""
    return 1 + sum(bool(step.keeps(need_cols, need_rows)) for step in transform.steps)


def windows_passing(transform: Transform) -> int:
    """The largest number of temporary windows that one step needs, forward or backward, besides the tape."""
    codes = [code for function in transform.functions for code in function.codes]
    return max((pointwise.most_alive(code) for code in codes), default=0)


def apply_and_record(
    transform: Transform, z: Tensor, cols: Tensor, rows: Tensor, need_cols: bool, need_rows: bool
) -> tuple[Tensor, Tape]:
    """(the transformed window [m, v], its tape). ``z`` [m, v] is overwritten.

    cols [C, v] and rows [R, m] are the slices of this window, in the dtype of z. ``need_cols`` and ``need_rows``:
    whether the gradients of these vectors will be asked for, which decides what the tape holds.
    """
    tape: Tape = []
    for step in transform.smooth.steps:
        keeps, x = step.keeps(need_cols, need_rows), step.operand(cols, rows)
        before = z
        z = step.kind.apply(before, x, None if keeps == "input" else before)
        if keeps == "input":
            tape.append(before)  # then z must be another buffer, because later steps overwrite z
            z = z.clone() if z.data_ptr() == before.data_ptr() or not z.is_contiguous() else z
        elif keeps == "output":
            tape.append(z)
            z = z.clone()
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
    """The gradient of the raw logits h @ w.T, in the buffer of ``dz`` [m, v]. The tape is used up.

    ``dcols`` [C, v] and ``drows`` [R, m] are added to; None where they are not needed.
    """
    for step in reversed(transform.smooth.steps):
        kind = step.kind
        kept = tape.pop() if step.keeps(dcols is not None, drows is not None) else None
        vectors, dim = (dcols, 0) if kind.axis == "c" else (drows, 1)
        if kind.vector and vectors is not None:
            share = dz if kept is None else kept.mul_(dz)
            vectors[int(step.value)] += share.sum(dim)
        dz = kind.pull(dz, step.operand(cols, rows), kept)
    return dz

"""One head of a `StackedProjection`: its logits with the steps that were applied to the stack.

A head that is picked by its index, ``z[:, k]``, is swept alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedhead.graph.sizes import same_size
from fusedhead.ir.logits import Logits, RowStep, StackedProjection, piece_of

aten = torch.ops.aten


def stacked_part(logits: Logits, part: Logits) -> Logits:
    """One head's logits with the steps that were applied to the stack."""
    shifted = [s.with_column_offset(len(part.cols)) for s in logits.steps]
    first = part.vocab[0] if part.vocab else 0
    vocab = (first + logits.vocab[0], first + logits.vocab[1]) if logits.vocab else part.vocab
    part_cols = piece_of(part.cols, *logits.vocab) if logits.vocab else part.cols
    cols = (*part_cols, *logits.cols)
    detached = part.detached if logits.detached is None else (len(part_cols) + logits.detached[0], 0)
    return replace(part, steps=part.steps + tuple(shifted), cols=cols, vocab=vocab, detached=detached)


def picked_part(logits: Logits, val: Tensor, dim: int, number: Any) -> Logits | None:
    """Head ``number`` of stacked logits, picked from dimension ``dim``; None if that is not the dimension of the heads.

    Between the stack and the pick, other dimensions may be sliced, and views taken that are undone.
    """
    head = logits.head
    if not isinstance(head, StackedProjection) or logits.rows or dim != head.dim or not isinstance(number, int):
        return None
    first, moves = head.parts[0].val, []
    whole = first.unsqueeze(dim).expand(*first.shape[:dim], len(head.parts), *first.shape[dim:])
    steps = list(logits.row_steps)
    while steps and steps[0].op is aten.slice.Tensor and steps[0].args[0] != dim:
        step = steps.pop(0)
        whole, (at, *bounds) = step.op(whole, *step.args), step.args
        moves.append(RowStep(step.op, (at - (at > dim), *bounds)))
    back = len(whole.shape) == logits.val.ndim and all(map(same_size, whole.shape, logits.val.shape))
    if logits.class_dim != whole.ndim - 1 or not back or not all(step.keeps_order for step in steps):
        return None  # views that keep the order and restore the shape cancel
    part = stacked_part(replace(logits, val=val), head.parts[number % len(head.parts)])
    return replace(part, val=val, row_steps=(*part.row_steps, *moves))

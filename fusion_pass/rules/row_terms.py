"""Row terms, one number a row, as in ``z - logsumexp(z)``. Reading entries needs no extra sweep for them.

Entries of z + t are those of z, plus t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from fusedhead.ir.builder import Emit
from fusedhead.ir.expr import Plain
from fusedhead.ir.logits import Logits
from fusedhead.kernels.transform.transform import Step

aten = torch.ops.aten


def without_row_terms(logits: Logits) -> tuple[Logits, list[Plain]]:
    """The logits before the terms that were added last, one number a row each, and those terms.

    Entries of z + t are those of z, plus t, so that z and z + t share a sweep.
    """
    terms: list[Plain] = []
    while not logits.has_no_gradient:
        steps = list(logits.steps)
        while steps and steps[-1].op == "round":
            steps.pop()
        row = logits.rows[-1] if logits.rows else None
        if not steps or row is None or steps.pop() != Step("addrow", len(logits.rows) - 1):
            break
        if row.after != len(logits.row_steps):  # the rows have moved since
            break
        terms.append(row.value)
        logits = replace(logits, val=row.shape_of, steps=tuple(steps), rows=logits.rows[:-1])
    return logits, terms


def flat_terms(emit: Emit, terms: Sequence[Plain], class_dim: int, rows: Sequence[Any]) -> list[Node]:
    """Each term as a float32 vector, one number a row; ``rows``: the rows' own shape, as ints and nodes."""
    sizes = [*rows[:class_dim], 1, *rows[class_dim:]]
    wide = [emit.cast(emit.ref(term), torch.float32) for term in terms]
    return [emit.flat(emit(aten.expand.default, term, sizes)) for term in wide]

"""Checks of the ops' arguments, and their error messages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.contract import STATS, Head
from fusedhead.kernels.transform.transform import Transform, parse


class LabelOutOfRange(IndexError, RuntimeError):
    """A label is no column of the logits. It is both errors of eager code: cross_entropy's and gather's."""


@lru_cache(maxsize=64)
def parse_stats(stats: str) -> frozenset[str]:
    """The statistics named in ``stats``, comma-joined. Raises ValueError naming one that is not known."""
    want = frozenset(stats.split(",")) - {""}
    unknown = sorted(want.difference(STATS))
    if unknown:
        raise ValueError(f"statistic {unknown[0]!r} is not known; expected some of {', '.join(STATS)}")
    return want


def _equal(what: str, got: int, other: str, expected: int) -> None:
    if got != expected:
        raise ValueError(f"{what} is {got} but {other} is {expected}; they must be equal")


def _vectors(name: str, x: torch.Size, other: str, length: int) -> None:
    if x.numel() and len(x) != 2:
        raise ValueError(f"{name} must be a matrix of one vector a row, got shape {list(x)}")
    if x.numel():
        _equal(f"the length of the vectors in {name}", x[1], other, length)


class Signature(NamedTuple):
    """The shapes and dtypes of an op's arguments."""

    h: torch.Size
    w: torch.Size
    y: torch.Size
    cols: torch.Size
    rows: torch.Size
    u: torch.Size
    dtypes: tuple[torch.dtype, ...]  # of h, w and y
    transform: str


@lru_cache(maxsize=1024)  # called in every step for every head
def _checked(head: Signature) -> Transform:
    """The transform. Raises unless sizes and dtypes fit together."""
    h, w, y, cols, rows, u, dtypes, text = head
    transform = parse(text)
    if len(h) != 2 or len(w) != 2 or len(y) != 2:
        raise ValueError(f"h, w and y must be matrices, got shapes {list(h)}, {list(w)} and {list(y)}")
    _equal("the hidden size of h", h[1], "the hidden size of w", w[1])
    _equal("the number of rows of the labels", y[0], "the number of tokens of h", h[0])
    _vectors("cols", cols, "the vocabulary of w", w[0])
    _vectors("rows", rows, "the number of tokens of h", h[0])
    if u.numel():
        _equal("the length of u", u[0], "the vocabulary of w", w[0])
    if dtypes[0] != dtypes[1] or not dtypes[0].is_floating_point:
        raise ValueError(f"h is {dtypes[0]} and w is {dtypes[1]}; both must have the same floating dtype")
    if dtypes[2] != torch.int64:
        raise ValueError(f"labels are {dtypes[2]}; they must be torch.int64")
    for step in transform.steps:
        for kind, index in step.vectors:
            shape = cols if kind == "c" else rows
            if index >= shape[0]:
                raise ValueError(f"the transform names vector {step.op}:{index} but only {shape[0]} were given")
    return transform


def head_of(operands: Sequence[Tensor], transform: str) -> Head:
    """The head with the operands h, w, y, cols, rows, u. Raises unless sizes, dtypes and labels fit together.

    Labels are read on the CPU only. On a device reading would synchronise; there the engine asserts.
    """
    h, w, y, cols, rows, u = operands
    dtypes = (h.dtype, w.dtype, y.dtype)
    parsed = _checked(Signature(h.shape, w.shape, y.shape, cols.shape, rows.shape, u.shape, dtypes, transform))
    if y.device.type == "cpu" and y.numel():
        least, most = (int(at) for at in y.aminmax())
        if least < 0 or most >= w.shape[0]:
            wrong = least if least < 0 else most
            raise LabelOutOfRange(f"label {wrong} is out of range: labels must lie in [0, {w.shape[0] - 1}]")
    return Head(h, w, y, cols, rows, u, parsed)

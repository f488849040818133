"""What the ops refuse, and in which words. It must not know what happens to operands that pass."""

from __future__ import annotations

import torch

from fusedhead.kernels.contract import STATS, Head


class LabelOutOfRange(IndexError, RuntimeError):
    """A label is no column of the logits. Both errors of eager code: cross_entropy's and gather's."""


def asked(stats: str) -> frozenset[str]:
    """The statistics named in ``stats``, comma-joined. Raises ValueError naming one that is not known."""
    want = frozenset(stats.split(",")) - {""}
    unknown = sorted(want.difference(STATS))
    if unknown:
        raise ValueError(f"statistic {unknown[0]!r} is not known; expected some of {', '.join(STATS)}")
    return want


def _equal(what: str, got: int, other: str, expected: int) -> None:
    if got != expected:
        raise ValueError(f"{what} is {got} but {other} is {expected}; they must be equal")


def _vectors(name: str, x: torch.Tensor, other: str, length: int) -> None:
    if x.numel() and x.dim() != 2:
        raise ValueError(f"{name} must be a matrix of one vector a row, got shape {list(x.shape)}")
    if x.numel():
        _equal(f"the length of the vectors in {name}", x.shape[1], other, length)


def check_head(head: Head) -> None:
    """Raise unless sizes, dtypes and labels fit together.

    Labels are read on the CPU only: elsewhere reading them would wait for the device, and the engine asserts.
    """
    h, w, y, cols, rows, u, transform = head
    if h.dim() != 2 or w.dim() != 2 or y.dim() != 2:
        raise ValueError(
            f"h, w and y must be matrices, got shapes {list(h.shape)}, {list(w.shape)} and {list(y.shape)}"
        )
    _equal("the hidden size of h", h.shape[1], "the hidden size of w", w.shape[1])
    _equal("the number of rows of the labels", y.shape[0], "the number of tokens of h", h.shape[0])
    _vectors("cols", cols, "the vocabulary of w", w.shape[0])
    _vectors("rows", rows, "the number of tokens of h", h.shape[0])
    if u.numel():
        _equal("the length of u", u.shape[0], "the vocabulary of w", w.shape[0])
    if h.dtype != w.dtype or not h.dtype.is_floating_point:
        raise ValueError(f"h is {h.dtype} and w is {w.dtype}; both must have the same floating dtype")
    if y.dtype != torch.int64:
        raise ValueError(f"labels are {y.dtype}; they must be torch.int64")
    for step in transform.steps:
        for kind, index in step.vectors:
            given = cols if kind == "c" else rows
            if index >= len(given):
                raise ValueError(f"the transform names vector {step.op}:{index} but only {len(given)} were given")
    if y.numel() and y.device.type == "cpu":
        least, most = (int(at) for at in y.aminmax())
        if least < 0 or most >= w.shape[0]:
            wrong = least if least < 0 else most
            raise LabelOutOfRange(f"label {wrong} is out of range: labels must lie in [0, {w.shape[0] - 1}]")

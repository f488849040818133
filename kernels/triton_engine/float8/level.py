"""The level of a row: an estimate of its lse before the sweep, from a sample of S classes.

    level2[i] = log2 Σ_{v in sample} 2^(z_iv·L)        the caller takes the maximum with the label's logit

in: h [N, D], w [V, D] of two bytes, y [N, K] int64. out: level2 [N] float32, base 2. FLOP 2NDS; bytes: 2SD for the
sampled rows of w, h as in `sweeps.statistics`. The sample is every (V / `STRIDED`)-th class and about `LABELLED` of the
labels, each class once: a likely class is the label of some token. The level is a lower bound of the lse. Relative to
it exponentials can only be too large: those too large for e4m3 are listed and not rounded
(`gluon.float8_exponentials`), and rows with some too large for float16 are swept again (`triton_engine.single_pass`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head
from fusedhead.kernels.transform.transform import parse
from fusedhead.kernels.triton_engine.launch.sweep import sweep
from fusedhead.kernels.triton_engine.rows.merge import merge_reference
from fusedhead.kernels.triton_engine.sweeps.statistics import stream

STRIDED, LABELLED = 256, 1024


def sampled_classes(y: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """(classes [S] int64, cols [1, S] float32: 1 for a class that occurs before). S depends on shapes alone."""
    step = max(1, vocab // STRIDED)
    strided = torch.arange(0, vocab, step, device=y.device)
    flat = y.reshape(-1)
    if not flat.numel():
        return strided, strided.new_zeros((1, len(strided)), dtype=torch.float32)
    labels = flat[:: max(1, len(flat) // LABELLED)].clamp(0, vocab - 1)
    number = torch.arange(len(labels), device=y.device)
    first = number.new_full((vocab,), len(labels)).scatter_reduce_(0, labels, number, "amin")
    repeated = (first[labels] != number) | (labels % step == 0)
    return torch.cat((strided, labels)), torch.cat((strided.new_zeros(len(strided)), repeated.long())).float()[None]


def row_levels(head: Head) -> Tensor:
    """level2 [N] float32, in base 2, without the maximum with the label's logit."""
    classes, repeated = sampled_classes(head.y, len(head.w))
    n = len(head.h)
    part = head._replace(w=head.w[classes], y=head.y[:, :0], cols=repeated, u=head.u[:0], transform=parse("dropcol:0"))
    lse_only = frozenset({"lse"})
    s = sweep("stream", part)
    rows, _ = stream(s, part, lse_only, None)
    level = head.h.new_empty(n, dtype=torch.float32)
    merge_reference(s, rows, level)
    return level

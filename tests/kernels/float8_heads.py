"""Heads for the float8 single pass in Triton's interpreter, whose sweep is that of `float8_sweep`, and their truths."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: tests/gpu", allow_module_level=True)

import float8_sweep

from fusedhead.kernels.contract import Head, HeadGrads, RowGrads, RowStats, Windows
from fusedhead.kernels.transform.transform import Transform
from fusedhead.kernels.triton_engine.float8 import single_pass
from tests.kernels.interpreted import F32


@pytest.fixture
def sweep_on_cpu(monkeypatch):
    monkeypatch.setattr(single_pass, "float8_exponentials", float8_sweep.float8_exponentials)


def made(n: int, v: int, d: int, sharp: float, labels: int = 1, seed: int = 0) -> Head:
    """Logits of standard deviation ``sharp``; a seventh of the labels are one class."""
    draw = torch.Generator().manual_seed(seed)
    h, w = (torch.randn(m, d, generator=draw) for m in (n, v))
    y = torch.randint(0, v, (n, labels), generator=draw)
    y[: n // 7] = 7
    nothing = torch.empty(0)
    return Head(h, w * sharp / d**0.5, y, nothing[None], nothing[None], nothing, Transform())


def mean_loss(head: Head, ignored: int = 17) -> RowGrads:
    """The coefficients of a mean cross-entropy that leaves out every ``ignored``-th token."""
    keep = (torch.arange(len(head.h)) % ignored != 3).float()
    c = keep / keep.sum()
    return RowGrads(c, -c[:, None] if head.y.shape[1] else None)


def passed(head: Head, c: RowGrads, tokens: int = 256, rows: int = 128) -> tuple[RowStats, HeadGrads]:
    return single_pass.one_float8_pass(head, c, Windows(tokens, len(head.w), F32, rows))


def true(head: Head, c: RowGrads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """lse, dh, dw in float64."""
    h, w = head.h.double(), head.w.double()
    z = h @ w.t()
    lse = z.logsumexp(1)
    a = c.lse.double()
    if c.square is not None:
        a = a + 2 * c.square.double() * lse
    dz = (z - lse[:, None]).exp() * a[:, None]
    if c.picked is not None:
        dz.scatter_add_(1, head.y, c.picked.double())
    return lse, dz @ w, dz.t() @ h

"""The comparison of float8 gradients, without a GPU: the errors it sees, the kernels it leaves out, what it allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

from benchmarks import gpu_float8
from benchmarks.data import Batch
from benchmarks.shapes import Case
from fusedhead.kernels.contract import Head, HeadGrads, RowGrads, RowStats, Windows
from fusedhead.lowering.plan import float8

CASE = Case(96, 32, 300, "bfloat16")


def batch_of(case: Case, kind: str) -> Batch:
    draw = torch.Generator().manual_seed(0)
    h, w = (torch.randn(m, case.hidden, generator=draw).bfloat16() for m in (case.tokens, case.vocab))
    y = torch.randint(0, case.vocab // 2, (case.tokens,), generator=draw)
    y[::17] = -100
    return Batch(h, w, y, torch.ones(case.tokens))


class Eager:
    """Kernels that compute as eager code does, and ``wrong`` times dw."""

    def __init__(self, wrong: float) -> None:
        self.wrong = wrong

    def step(self, head: Head, c: RowGrads, windows: Windows) -> Any:
        dh, dw = gpu_float8.eager(head, c)
        if self.wrong == 0:
            raise_ = RuntimeError("no kernel for this")

            def fail() -> None:
                raise raise_

            return fail
        lse = (head.h.float() @ head.w.float().t()).logsumexp(1)
        return lambda: (RowStats(lse), HeadGrads(dh, self.wrong * dw, None, None))


def test_kernels_that_fail_or_err_are_named_and_left_out(monkeypatch):
    monkeypatch.setattr(gpu_float8, "batch_of", batch_of)
    monkeypatch.setattr(gpu_float8, "windows_of", lambda case, gradients: Windows(96, 300, torch.bfloat16))
    packages: Any = {"fusedhead": Eager(1), "same": Eager(1), "wrong": Eager(1.2), "failing": Eager(0)}
    dropped: dict[str, str] = {}
    found = gpu_float8.compared(CASE, "random", packages, dropped)
    assert list(packages) == ["fusedhead", "same"]
    assert set(dropped) == {"wrong", "failing"}
    assert "no kernel for this" in dropped["failing"]
    assert found["same"]["dw"] == found["exact"]["dw"] == found["eager"]["dw"] < 0.02
    assert found["same"]["same twice"]
    assert found["same"]["lse apart"] == 0
    assert found["wrong"]["dw"] == pytest.approx(0.2, rel=0.1)
    lines = gpu_float8.table({"times": {}, "errors": {"here": found}, "left out": dropped})
    assert any(line.startswith("   same: dh 1.00 (1.00) dw 1.00 (1.00)") for line in lines)
    assert lines[-1].startswith("failing left out")


def test_every_hidden_size_is_allowed_inside_and_none_more_outside():
    case = Case(8192, 768, 50304)
    assert gpu_float8.windows_of(case, "float8").tail_rows
    assert not gpu_float8.windows_of(case, "exact").tail_rows
    before = float8.EXACT
    with gpu_float8.any_hidden_size():
        assert len(float8.EXACT) == len(before) - 1
    assert float8.EXACT is before

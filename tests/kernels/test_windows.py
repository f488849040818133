"""Windows of the Triton engine: slices that cover a head once, and operands in the form that kernels read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is published for Linux only")

from fusedhead.kernels.contract import Head, RowGrads
from fusedhead.kernels.transform.transform import parse
from fusedhead.kernels.triton_engine.windows import (
    even_cuts,
    full_cuts,
    new_window,
    ready_head,
    ready_rows,
    rows_of,
    slice_head,
)


def head(n: int = 6, v: int = 10, d: int = 4) -> Head:
    cols, rows, u = torch.randn(1, v), torch.randn(2, n), torch.rand(v)
    return Head(torch.randn(n, d), torch.randn(v, d), torch.randint(0, v, (n, 1)), cols, rows, u, parse("addcol:0"))


@given(st.integers(0, 5000), st.integers(1, 6000))
def test_cuts_cover_every_row_once_in_windows_of_at_most_the_size(total: int, size: int) -> None:
    for cuts in (list(even_cuts(total, size)), full_cuts(total, size)):
        assert [at for i in cuts for at in range(i.start, i.stop)] == list(range(total))
        assert all(i.stop - i.start <= size for i in cuts)


@given(st.integers(1, 5000), st.integers(128, 6000))
def test_even_windows_but_the_last_are_equal_and_aligned_where_there_is_room(total: int, size: int) -> None:
    first, *others = (i.stop - i.start for i in even_cuts(total, size))
    assert all(length == first for length in others[:-1])
    assert first in (size, total) or first % 128 == 0


def test_a_slice_of_a_head_has_the_vectors_of_its_rows_and_columns() -> None:
    x = head()
    part = slice_head(x, slice(1, 3), slice(4, 9))
    assert torch.equal(part.h, x.h[1:3])
    assert torch.equal(part.w, x.w[4:9])
    assert torch.equal(part.y, x.y[1:3])  # counted from the first column of all
    assert torch.equal(part.cols, x.cols[:, 4:9])
    assert torch.equal(part.rows, x.rows[:, 1:3])
    assert torch.equal(part.u, x.u[4:9])
    assert slice_head(x, slice(0, 6), slice(0, 10)) is x
    assert rows_of(x.h, slice(0, 6)) is x.h


def test_vectors_become_float32_with_a_unit_stride_and_others_are_not_copied() -> None:
    x = head()._replace(cols=torch.randn(10, 1).t().double(), rows=torch.randn(6, 2).t())
    got = ready_head(x)
    assert all(t.dtype == torch.float32 and t.stride(-1) == 1 for t in (got.cols, got.rows, got.u))
    assert got.u is x.u
    assert got.h is x.h
    g = ready_rows(RowGrads(torch.rand(6, dtype=torch.float64), torch.rand(1, 6).t()))
    assert g.lse is not None
    assert g.lse.dtype == torch.float32
    assert g.sum is None


def test_operands_on_different_devices_are_named() -> None:
    with pytest.raises(ValueError, match="h is on cpu and w on meta"):
        ready_head(head()._replace(w=torch.empty(10, 4, device="meta")))


def test_rows_of_a_window_are_padded() -> None:
    assert new_window(head(), 5, 70).shape == (5, 128)

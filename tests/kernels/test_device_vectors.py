"""The vectors of a transform inside kernels: entries past the end are zero, whatever the value that they go with."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

import triton
import triton.language as tl

from fusedhead.kernels.triton_engine.device.vectors import Vectors, along_columns, along_rows, prefetch_columns

ROWS, COLUMNS, N, V = 8, 16, 6, 13


@triton.jit
def _tile(cols, stride_cols, rows, stride_rows, out, N, V, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, col = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    vectors = Vectors(cols, stride_cols, V, rows, stride_rows, N)
    prefetch_columns(vectors, col, ("addcol", 1), False)
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    result = z + along_columns(z, vectors, 1, col) + along_rows(z, vectors, 1, row)
    tl.store(out + row[:, None] * COLUMNS + col[None, :], result)


@triton.jit
def _line(cols, stride_cols, rows, stride_rows, out, N, V, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    vectors = Vectors(cols, stride_cols, V, rows, stride_rows, N)
    z = tl.zeros((SIZE,), tl.float32)
    tl.store(out + at, along_columns(z, vectors, 0, at) + along_rows(z, vectors, 0, at))


@pytest.mark.parametrize("padding", [0, 3])
def test_entries_are_those_of_the_tile_and_zero_past_the_end(padding: int) -> None:
    cols, rows = torch.randn(2, V + padding)[:, :V], torch.randn(2, N + padding)[:, :N]
    tile, line = torch.empty(ROWS, COLUMNS), torch.empty(COLUMNS)
    _tile[(1,)](cols, cols.stride(0), rows, rows.stride(0), tile, N, V, ROWS, COLUMNS)
    _line[(1,)](cols, cols.stride(0), rows, rows.stride(0), line, N, V, COLUMNS)

    def padded(x: torch.Tensor, size: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, size - len(x)))

    assert torch.equal(tile, padded(cols[1], COLUMNS)[None] + padded(rows[1], ROWS)[:, None])
    assert torch.equal(line, padded(cols[0], COLUMNS) + padded(rows[0], COLUMNS))

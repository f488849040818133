"""Sweeps: windows of one layout share a sweep, whatever their addresses, and others do not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

from fusedhead.kernels.contract import Head
from fusedhead.kernels.transform.transform import parse
from fusedhead.kernels.triton_engine.launch import sweep as sweeps
from fusedhead.kernels.triton_engine.launch.sweep import multiplied_by_cublas, sweep
from fusedhead.kernels.triton_engine.launch.tiles import Tile


def head(n: int = 40, v: int = 700, d: int = 32, k: int = 1, transform: str = "", dtype=torch.float32) -> Head:
    vectors = torch.randn(2, v), torch.randn(2, n)
    h, w, y = torch.randn(n, d, dtype=dtype), torch.randn(v, d, dtype=dtype), torch.zeros(n, k, dtype=torch.int64)
    return Head(h, w, y, *vectors, torch.empty(0), parse(transform))


def test_windows_of_one_layout_share_a_sweep() -> None:
    assert sweep("stream", head()) is sweep("stream", head())
    assert sweep("exp", head()).beside("stream") is sweep("stream", head())


@pytest.mark.parametrize(
    "other", [{"n": 41}, {"v": 701}, {"d": 31}, {"k": 2}, {"transform": "tanh"}, {"dtype": torch.float16}], ids=str
)
def test_windows_of_another_layout_have_a_sweep_of_their_own(other: dict) -> None:
    assert sweep("stream", head()) is not sweep("stream", head(**other))


def test_forgetting_chooses_tiles_anew() -> None:
    before = sweep("stream", head())
    sweeps.forget()
    assert sweep("stream", head()) is not before


def test_a_given_tile_takes_the_place_of_the_tables() -> None:
    tile = Tile(16, 64, 16, 1, 1, 1, False, 2)
    assert sweep("stream", head(), tile=tile).tile == tile


def test_a_sweep_asks_only_for_vectors_that_its_transform_reads() -> None:
    s = sweep("stream", head(transform="mul:2.0 addcol:1"))
    assert (s.has_cols, s.has_rows, s.has_u) == (True, False, False)


def test_logits_that_lie_in_memory_stand_for_both_operands() -> None:
    x, window = head(), torch.empty(40, 704)
    s = sweep("stream", x, logits=window)
    assert s.operands(x.h, x.w, window) == (window, window)
    assert s.arguments()["READY"]


def test_cublas_multiplies_float32_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(sweeps, "device_of", lambda device: (9, 132))
    assert multiplied_by_cublas(head())
    assert not multiplied_by_cublas(head(dtype=torch.bfloat16))


def test_there_is_no_cublas_on_a_cpu() -> None:
    assert not multiplied_by_cublas(head())

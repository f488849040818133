"""A GPU with a name and a file of tuned tiles of its own, for tests on machines that have none."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

from fusedhead.kernels.triton_engine.launch import tuned_tiles
from fusedhead.kernels.triton_engine.launch.tuned_tiles import tuned_tile

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def chip(monkeypatch, tmp_path):
    """A file of its own, a GPU with a name."""
    monkeypatch.setenv("FUSEDHEAD_TILES", str(tmp_path / "deep" / "tiles.json"))
    monkeypatch.setattr(tuned_tiles, "device_key", lambda device: f"chip {device.index}")
    tuned_tiles.known.cache_clear()
    yield
    tuned_tiles.known.cache_clear()


def tile(kernel="exp", device=GPU, tokens=4096, hidden=1024, itemsize=2, tma=True, pairs=True):
    return tuned_tile(kernel, device, tokens, hidden, itemsize, tma, pairs)

"""Tuning keeps the fastest tile of each kernel, and the fastest that is no pair."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

from fusedhead import tune
from fusedhead.kernels.triton_engine.launch import tiles, tuning
from fusedhead.kernels.triton_engine.launch.tuned_tiles import KERNELS
from tests.kernels.tuned_chip import GPU, chip, tile  # noqa: F401  a fixture for every test


def test_tuning_keeps_the_fastest_tile_of_each_kernel_and_the_fastest_that_is_no_pair(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tiles, "pairs_serve", lambda device: True)
    of_cpu = tuning.make_head(130, 64, 300, "cpu")
    monkeypatch.setattr(tuning, "make_head", lambda *inputs: of_cpu)
    built = tuning.step_of

    def step_of(kernel, head, candidate):
        if candidate.stages == 5:
            raise RuntimeError("out of resource: shared memory")
        built(kernel, head, candidate)
        return lambda: candidate

    monkeypatch.setattr(tuning, "step_of", step_of)
    order = {(True, 22): 1.0, (False, 33): 2.0}
    clock = lambda step: order.get((step().paired, step().group), 3.0)  # noqa: E731
    assert tune.main(["--hidden", "1024"], clock) == 0
    for kernel in KERNELS:
        assert (tile(kernel).paired, tile(kernel).group) == (True, 22)
        assert (tile(kernel, pairs=False).paired, tile(kernel, pairs=False).group) == (False, 33)
    assert "kept in" in capsys.readouterr().out


def test_without_a_gpu_tuning_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err

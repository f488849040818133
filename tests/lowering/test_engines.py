"""Engines: the first that supports device and dtype computes a head; self-checks decide for untested chips."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels import chips
from fusedhead.lowering import engines
from fusedhead.lowering.engines import engine_for

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtype", "device", "engine"),
    [
        (BF16, "cuda", "triton windows"),
        (FP16, "cuda", "triton windows"),
        (FP32, "cuda", "triton windows"),
        (FP64, "cuda", "torch windows"),
        (BF16, "cpu", "torch windows"),
        (FP32, "mps", "torch windows"),
    ],
)
def test_the_engine_follows_device_and_dtype(dtype, device, engine):
    assert engine_for(dtype, device).name == engine


@pytest.mark.parametrize(
    ("hip", "majors", "engine"),
    [
        (None, [9], "triton windows"),
        (None, [9, 8], "triton windows"),
        (None, [10], "triton windows"),
        (None, [12, 9], "triton windows"),
        (None, [7], "torch windows"),
        (None, [8, 7], "torch windows"),
        ("6.4", [9], "triton windows"),  # an MI300 calls itself 9.4
    ],
)
def test_chips_that_no_test_runs_on_take_the_triton_engine_where_a_self_check_agrees(monkeypatch, hip, majors, engine):
    assert chosen_on(monkeypatch, hip, majors, agrees=True) == engine


@pytest.mark.parametrize(("hip", "majors"), [(None, [8]), (None, [9, 8]), (None, [10]), ("6.4", [9])])
def test_chips_whose_self_check_fails_take_the_torch_engine(monkeypatch, hip, majors):
    assert chosen_on(monkeypatch, hip, majors, agrees=False) == "torch windows"


def test_hopper_is_tested_and_asks_for_no_check(monkeypatch):
    assert chosen_on(monkeypatch, None, [9, 9], agrees=False) == "triton windows"


def chosen_on(monkeypatch, hip, majors, agrees: bool) -> str:
    """The engine on a machine with such GPUs, whose self-checks agree or do not."""
    monkeypatch.setattr(chips.self_check, "serves", lambda claim, device: agrees)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(majors))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (majors[at], 0))
    monkeypatch.setattr(engines, "triton_serves", chips.triton_serves.__wrapped__)
    return engine_for(BF16, "cuda").name

"""Ranges of the profiler and frames of memory snapshots carry a head's module and sizes, and cost nothing otherwise."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedhead.lowering import ranges
from tests.eager_stack import Rewritten

N, D, V = 24, 16, 96


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(h), y)


def test_the_profiler_shows_module_and_sizes_in_a_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "module_names", {})
    compiled = Rewritten(Model())
    h, y = torch.randn(N, D, requires_grad=True), torch.randint(0, V, (N,))
    compiled(h, y).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(h, y).backward()
    names = [event.key for event in profile.key_averages() if " N=" in event.key]
    assert names == [f"fusedhead::head_loss lm_head N={N} D={D} V={V}"]


def test_the_frame_of_an_allocation_has_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def implementation(h: Tensor, w: Tensor) -> list[str]:
        frame, seen = sys._getframe(), []
        while frame is not None:
            seen.append(frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]
        return seen

    monkeypatch.setattr(ranges, "module_names", {})
    ranges.remember(V, D, "lm_head")
    ranges.remember(V, D, "lm_head")
    operands = ranges.operands_named("(Tensor h, Tensor w, int memory=0) -> Tensor")
    named = ranges.ranged("head_stats", operands, implementation)
    h, w = torch.empty(N, D), torch.empty(V, D)
    assert not [name for name in named(h, w) if "fusedhead::" in name]
    monkeypatch.setattr(ranges, "recording", lambda: True)
    assert f"fusedhead::head_stats lm_head N={N} D={D} V={V}" in named(h, w)


def test_heads_of_one_size_share_a_name_and_many_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "module_names", {})
    for at in range(6):
        ranges.remember(V, D, f"heads.{at}")
    assert ranges.range_name("op", N, V, D) == f"fusedhead::op heads.0|heads.1|heads.2|heads.3|... N={N} D={D} V={V}"
    assert ranges.range_name("op", N, V, 1) == f"fusedhead::op N={N} D=1 V={V}"

"""Unsafe blocks: which token blocks are swept again, and the references that their totals give."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

from fusedhead.kernels.triton_engine.launch.sweep import Sweep, sweep
from fusedhead.kernels.triton_engine.rows.label_map import map_labels
from fusedhead.kernels.triton_engine.rows.unsafe_blocks import mark_unsafe, rebase_unsafe
from fusedhead.kernels.triton_engine.sweeps.exponentials import exponentials
from tests.kernels.interpreted import head

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
N, V = 40, 200
BOUNDS, SHIFT = (2.0**3, 2.0**15), 4.0


def swept(above: dict[int, float]) -> tuple[Sweep, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sweep, totals, references, base-2 lse); references lie SHIFT below the lse, some rows' by more (``above``)."""
    x = head(N, V)
    lse2 = (x.h.double() @ x.w.double().t()).logsumexp(1) / math.log(2)
    ref2 = (lse2 - SHIFT).float()
    for row, more in above.items():
        ref2[row] -= more
    s = sweep("exp", x)
    part = torch.empty((1, s.schedule.size))
    picked = torch.empty((N, 1))
    exponentials(s, x, torch.empty((N, 256)), ref2, picked, picked, part, map_labels(s, x.y, check=True))
    return s, part, ref2, lse2


def blocks(s: Sweep, rows: list[int]) -> list[int]:
    return sorted({row // s.tile.BM for row in rows})


@pytest.mark.parametrize("above", [{}, {5: 11.5}, {5: -2.0}, {0: 30.0, 39: 12.0}, {20: 100.0}])
def test_a_block_with_a_total_outside_the_bounds_is_marked_and_its_references_become_those_of_the_lse(above):
    s, part, ref2, lse2 = swept(above)
    before = ref2.clone()
    flags, lost = rebase_unsafe(s, part, ref2, BOUNDS, SHIFT)
    assert flags.nonzero().flatten().tolist() == blocks(s, list(above))
    assert not lost.any()
    marked = flags[torch.arange(N) // s.tile.BM] != 0
    assert ((ref2 - (lse2 - SHIFT))[marked].abs() < 1e-4).all()
    assert torch.equal(ref2[~marked], before[~marked])


@pytest.mark.parametrize("above", [{7: 300.0}, {7: -300.0}])
def test_a_total_that_float32_does_not_hold_is_lost_and_the_other_rows_of_its_block_are_not(above):
    s, part, ref2, lse2 = swept(above)
    broken = ref2[7].item()
    flags, lost = rebase_unsafe(s, part, ref2, BOUNDS, SHIFT)
    assert flags.tolist() == lost.tolist()
    assert lost.nonzero().flatten().tolist() == blocks(s, [7])
    assert ref2[7] == broken
    others = torch.arange(N) != 7
    assert (ref2 - (lse2 - SHIFT))[others].abs().max() < 1e-4


def test_float32_marks_totals_that_left_its_range_alone():
    s, part, _, _ = swept({5: 50.0, 20: 70.0})
    assert mark_unsafe(s, part).nonzero().flatten().tolist() == blocks(s, [20])

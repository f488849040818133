"""The order of tiles: every tile once, every slot once. Kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

import triton
import triton.language as tl

from fusedhead.kernels.triton_engine.device.schedule import locate, partial_offset, schedule, step_counts
from fusedhead.kernels.triton_engine.launch import tiles as triton_tiles

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@triton.jit
def _visits(seen, slots_seen, N, V, GROUP, BM: tl.constexpr, BN: tl.constexpr):
    pid = tl.program_id(0)
    P = tl.num_programs(0)
    main_steps, steps = step_counts(pid, P, N, V, GROUP, BM, BN)
    for step in range(0, steps):
        block, tile, slot, last = locate(step, main_steps, pid, P, N, V, GROUP, BM, BN)
        at = seen + block * tl.cdiv(V, BN) + tile
        tl.store(at, tl.load(at) + 1)
        if last:
            start, _, _ = partial_offset(block, slot, P, N, V, GROUP, BM, BN)
            to = slots_seen + start + tl.arange(0, BM)
            tl.store(to, tl.load(to) + 1)


@pytest.mark.parametrize("blocks", [1, 3, 5, 8])
@pytest.mark.parametrize("tiles", [1, 4, 9])
@pytest.mark.parametrize("multiprocessors", [1, 6, 7])
def test_the_schedule_visits_every_tile_once_and_fills_every_slot_once(blocks, tiles, multiprocessors):
    tile = triton_tiles.Tile(2, 4, 1, 3, 1, 1)
    n, v = blocks * 2 - 1, tiles * 4 - 1
    plan = schedule(n, v, tile, multiprocessors)
    seen, filled = torch.zeros(blocks, tiles, dtype=torch.int32), torch.zeros(plan.size, dtype=torch.int32)
    _visits[(plan.programs,)](seen, filled, n, v, plan.group, BM=2, BN=4)
    assert plan.programs <= multiprocessors
    assert seen.eq(1).all()
    assert filled.eq(1).all()

"""The sweep of exponentials against float64: the window, and the labels' logits and slopes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

from fusedhead.kernels.transform.transform import apply
from fusedhead.kernels.triton_engine.launch.sweep import sweep
from fusedhead.kernels.triton_engine.rows.label_map import map_labels
from fusedhead.kernels.triton_engine.sweeps.exponentials import exponentials
from fusedhead.kernels.triton_engine.windows import new_window
from tests.kernels.interpreted import STEPS, doubled, error, head

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
L2E = 1.4426950408889634


@pytest.mark.parametrize("transform", ["", "addcol:0 mulrow:1 mul:0.5", "mul:0.2 tanh mul:5.0", "mulcol:1"])
@pytest.mark.parametrize(("k", "marked"), [(0, None), (1, None), (2, (1, 0, 1))])
def test_the_window_and_what_stands_at_the_labels_of_marked_token_blocks(
    transform: str, k: int, marked: tuple[int, ...] | None
) -> None:
    n, v = 37, 70
    x = head(n=n, v=v, k=k, transform=transform)
    s = sweep("exp", x)
    nan = float("nan")
    window, ref2 = new_window(x, n, v).fill_(nan), torch.linspace(-2, 2, n)
    picked, slope = torch.full((n, k), nan), torch.full((n, k), nan)
    part = torch.zeros(1, s.schedule.size)
    flags = None if marked is None else torch.tensor(marked, dtype=torch.int32)
    exponentials(s, x, window, ref2, picked, slope, part, map_labels(s, x.y) if k else None, flags)
    wide = doubled(x)
    raw = (wide.h @ wide.w.T).detach().requires_grad_()
    z = apply(x.transform, raw, wide.cols, wide.rows)
    (along,) = torch.autograd.grad(z.sum(), raw)
    z = z.detach()
    varying = x.transform.varies_along_row
    # the slope of a row's own factors is left to `finalize`
    rows = wide.rows[1, :, None].detach() * 0.5 if "mulrow" in transform else torch.ones(n, 1, dtype=torch.float64)
    c = along / rows if varying else torch.ones_like(z)
    e = torch.exp2(z * L2E - ref2.double()[:, None])
    there = torch.ones(n, dtype=torch.bool) if flags is None else flags.bool().repeat_interleave(s.tile.BM)[:n]
    assert error(window[there, :v], (e * c)[there]) < 4 * STEPS  # a rounding of z is |z| roundings of its exponential
    assert window[~there, :v].isnan().all()
    if k:
        assert error(picked[there], z.gather(1, x.y)[there]) < STEPS
    if k and varying:
        assert error(slope[there], c.gather(1, x.y)[there]) < STEPS

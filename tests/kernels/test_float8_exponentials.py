"""The sweep that stores exponentials in float8, run on the CPU against torch's own ops (`float8_sweep`)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
gluon = pytest.importorskip("triton.experimental.gluon", reason="pairs are written in Gluon")

import float8_sweep  # noqa: E402
from gluon_on_cpu import Descriptor, on_cpu, run  # noqa: E402

from fusedhead.kernels.triton_engine.device import rows, schedule  # noqa: E402
from fusedhead.kernels.triton_engine.float8.exponentials import Tail, padded  # noqa: E402
from fusedhead.kernels.triton_engine.gluon import float8_exponentials, ring, tile  # noqa: E402
from fusedhead.kernels.triton_engine.rows.label_map import map_labels  # noqa: E402
from tests.kernels.pairs import SHAPES, made, swept  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # rows past the end
MODULES = (ring, tile, float8_exponentials, rows, schedule)


@pytest.mark.parametrize(("n", "v", "d", "group", "stages", "k"), SHAPES)
@pytest.mark.parametrize("marked", [False, True])
def test_exponentials_in_float8_by_rows_and_by_columns(n, v, d, group, stages, k, marked):
    head = made(n, v, d, k)
    head.h[5] = float("nan")  # is marked everywhere, and stays in its row
    s, bound, programs = swept("exp8", head, group, stages)
    ref2, gain = torch.linspace(-2, 2, n), torch.logspace(0, 2, n)
    labels = map_labels(s, head.y) if k else head.y
    flags = torch.arange(s.schedule.blocks, dtype=torch.int32) % 2
    tails, sums, logits = [], [], []
    for _ in range(2):
        by_rows = torch.full((padded(n, 128), padded(v, 64)), 1.0).to(torch.float8_e4m3fn)
        by_columns = torch.full((padded(v, 64), padded(n, 128) + 128), 1.0).to(torch.float8_e4m3fn)
        tails.append(Tail(by_rows, by_columns, torch.zeros(n, -(-v // 192), dtype=torch.uint8)))
        logits.append(torch.zeros(n, k))
        sums.append(torch.zeros(1, s.schedule.size))
    tail = tails[0]
    own = {"ld": tail.rows.stride(0), "ldt": tail.columns.stride(0), "tiles": tail.hot.shape[1], "ONLY": marked}
    with on_cpu(*MODULES):
        of = (Descriptor(head.h), Descriptor(head.w), *(x.view(torch.uint8) for x in tail))
        rest = (head.y, labels, flags, ref2, gain, logits[0], sums[0])
        run(float8_exponentials.float8_exp_pair_kernel, programs, (*of, *rest), bound | own)
    float8_sweep.float8_exponentials(
        s, head, tails[1], ref2, gain, logits[1], sums[1], labels if k else None, flags if marked else None
    )
    for name, a, b in zip(Tail._fields[:2], *tails):
        a, b = a.float(), b.float()
        assert torch.equal(a.signbit(), b.signbit()), name
        assert torch.allclose(a, b, rtol=2**-3, atol=2**-9), name  # a logit's last bit may tip a rounding
        assert (a != b).float().mean() < 1e-3, name
    assert torch.equal(tails[0].hot, tails[1].hot)
    assert torch.allclose(logits[0], logits[1], atol=1e-5, equal_nan=True)
    padding = (s.schedule.blocks * 128 - n) * v * (not marked or flags[-1].item())  # of logits that are zero
    total = sums[1].nansum(dtype=torch.float64).item() + padding
    assert sums[0].nansum(dtype=torch.float64).item() == pytest.approx(total, rel=1e-5)

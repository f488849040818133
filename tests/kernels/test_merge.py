"""Merge: partial results of several slots give the statistics of the whole row. Kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

from fusedhead.kernels.triton_engine.launch.sweep import Sweep, sweep
from fusedhead.kernels.triton_engine.rows.merge import merge_reference, merge_statistics
from tests.kernels.interpreted import head

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
L2E = 1.4426950408889634
WANT = frozenset({"lse", "entropy", "variance", "sum", "spread", "max", "argmax"})


def partials(z: torch.Tensor, s: Sweep) -> tuple[torch.Tensor, torch.Tensor]:
    """What a sweep leaves of logits z [16, V] whose columns lie in slots: one token block, one slot after another."""
    slots, rows = s.schedule.size // 16, []
    tops = []
    for columns in z.tensor_split(slots, dim=1):
        x = columns.double() * L2E
        ref2 = x.amax(1, keepdim=True)
        base = torch.where(ref2.isfinite(), ref2, 0)
        e, d = torch.exp2(x - base), x - base
        weight = torch.full((16,), columns.shape[1], dtype=torch.float64)
        rows.append(
            [ref2[:, 0], e.sum(1), (e * d).sum(1), columns.double().sum(1), d.sum(1), weight, (e * d * d).sum(1)]
        )
        tops.append(columns.max(1))
    part = torch.stack([torch.cat(values) for values in zip(*rows)]).float()
    bits = torch.cat([top.values for top in tops]).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    first = [
        at * 0 + sum(c.shape[1] for c in z.tensor_split(slots, 1)[:i]) for i, at in enumerate(t.indices for t in tops)
    ]
    columns = torch.cat([top.indices + begin for top, begin in zip(tops, first)])
    return part, torch.stack([keys, columns.int()])


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_statistics_of_slots_are_those_of_the_row(scale: float) -> None:
    torch.manual_seed(0)
    s = sweep("stream", head(n=16, v=192), WANT)
    assert s.schedule.size > 16
    z = torch.randn(16, 192) * scale
    z[3, 7] = z[3, 150] = z[3].max() + 1  # a tie over two slots
    got = merge_statistics(s, *partials(z, s), WANT)
    wide = z.double()
    logp = wide.log_softmax(1)
    p = logp.exp()
    entropy = -(p * logp).sum(1)
    exact = {
        "lse": wide.logsumexp(1), "entropy": entropy, "variance": (p * logp**2).sum(1) - entropy**2,
        "sum": wide.sum(1), "spread": -logp.sum(1),
    }  # fmt: skip
    for name, value in exact.items():
        torch.testing.assert_close(
            got[name].double(), value, rtol=2e-6, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert torch.equal(got["max"], z.amax(1))
    assert torch.equal(got["argmax"], z.argmax(1))
    assert got["argmax"][3] == 7
    exact_lse = got["lse"].double() + got["lse_low"].double()
    assert (exact_lse - exact["lse"]).abs().max() <= (got["lse"].double() - exact["lse"]).abs().max()


def test_a_reference_is_the_lse_in_base_2_and_zero_where_that_is_not_finite() -> None:
    s = sweep("stream", head(n=16, v=192))
    z = torch.randn(16, 192)
    z[2, 5], z[4] = torch.inf, -torch.inf
    ref2 = torch.full((16,), 7.0)
    merge_reference(s, partials(z, s)[0], ref2, shift=1.0)
    exact = z.double().logsumexp(1) * L2E + 1
    assert ref2[2] == ref2[4] == 0
    fine = exact.isfinite()
    torch.testing.assert_close(ref2[fine].double(), exact[fine], rtol=1e-6, atol=1e-6)


def test_only_marked_token_blocks_get_a_reference() -> None:
    s = sweep("stream", head(n=16, v=192))
    for mark in (0, 1):
        ref2 = torch.full((16,), 7.0)
        merge_reference(s, partials(torch.randn(16, 192), s)[0], ref2, 0.0, torch.tensor([mark], dtype=torch.int32))
        assert bool((ref2 == 7).all()) == (mark == 0)

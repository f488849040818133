"""The float8 single pass against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: tests/gpu", allow_module_level=True)

from float8_heads import made, mean_loss, passed, sweep_on_cpu, true  # noqa: F401

from fusedhead.kernels.contract import Head, RowGrads
from fusedhead.kernels.triton_engine.float8 import single_pass
from fusedhead.kernels.triton_engine.launch.tiles import PAIRED_FROM
from fusedhead.lowering.plan.float8 import FLOAT8_PRODUCT_BYTES
from tests.kernels.interpreted import error

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
    pytest.mark.usefixtures("sweep_on_cpu"),
]


def eager_errors(head: Head, c: RowGrads) -> tuple[float, float]:
    """Errors of dh and dw of eager PyTorch in bfloat16, whose products are otherwise exact."""
    _, dh, dw = true(head, c)
    h, w = head.h.bfloat16(), head.w.bfloat16()
    dz = (h.float() @ w.float().t()).bfloat16().float().softmax(1) * c.lse[:, None]
    dz = dz.scatter_add(1, head.y, c.picked).bfloat16().double()
    return error((dz @ w.double()).bfloat16(), dh), error((dz.t() @ h.double()).bfloat16(), dw)


@pytest.mark.parametrize(("tokens", "rows"), [(256, 128)])
def test_gradients_err_less_than_those_of_eager_bfloat16(tokens, rows):
    head = made(132, 200, 16, 5.0)
    c = mean_loss(head)
    stats, grads = passed(head, c, tokens, rows)
    lse, dh, dw = true(head, c)
    at_h, at_w = eager_errors(head, c)
    assert error(stats.lse, lse) < 2e-7
    assert error(grads.h, dh) < 0.5 * at_h
    assert error(grads.w, dw) < 0.5 * at_w
    again = passed(head, c, tokens, rows)[1]
    assert torch.equal(grads.h, again.h)
    assert torch.equal(grads.w, again.w)


def test_rows_whose_level_is_far_off_are_swept_again(monkeypatch):
    head = made(40, 200, 16, 6.0)
    c = mean_loss(head)
    swept = []
    sweep = single_pass.float8_exponentials

    def counted(*args, **kwargs):
        flags = args[8] if len(args) > 8 else None
        if flags is not None:
            swept.append(int(flags.sum()))
        sweep(*args, **kwargs)

    monkeypatch.setattr(single_pass, "float8_exponentials", counted)
    monkeypatch.setattr(single_pass, "row_levels", lambda head: torch.full((len(head.h),), -60.0))
    head.y[:] = head.w.mul(head.h[:1]).sum(1).argmin()  # an unlikely label, so that nothing raises the level
    _, grads = passed(head, c)
    assert sum(swept) > 0
    _, dh, dw = true(head, c)
    assert error(grads.h, dh) < 4e-3
    assert error(grads.w, dw) < 4e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_stays_alone(bad):
    head = made(24, 200, 16, 4.0)
    head.h[5, 3] = bad
    c = mean_loss(head)
    stats, grads = passed(head, c)
    _, dh, _ = true(head, c)
    others = torch.arange(24) != 5
    assert stats.lse[others].isfinite().all()
    assert grads.h[5].isnan().all()
    assert error(grads.h[others], dh[others]) < 4e-3


@pytest.mark.parametrize("size", [30.0, 3e3, 3e6, 1e9])
def test_no_list_of_ties_outgrows_its_room_at_any_size_of_logits(size, monkeypatch):
    """A hundred classes tie in every row: more than there is room for, if rounding of the lse lets all be listed."""
    head = made(40, 200, 16, 1.0)
    head.h[:] = head.h[:1]
    head.w[:100] = head.h[0] / head.h[0].norm() ** 2 * size
    head.w[100:] = 0
    head.y[:] = torch.arange(40)[:, None]
    fill, reached = single_pass.fill_entries, []

    def bounded(*given):
        ends, classes = given[-2], given[-1]
        reached.append(int(ends.max()) <= len(classes))
        fill(*given)

    monkeypatch.setattr(single_pass, "fill_entries", bounded)
    c = mean_loss(head)
    _, grads = passed(head, c)
    assert all(reached)
    if size < 1e5:  # beyond, the last bits of float32 logits decide which classes tie
        _, dh, dw = true(head, c)
        # entries of ties are rounded alike, so that nothing averages out: what the report says is the bound
        assert (grads.h.double() - dh).abs().max() < 0.13 * c.lse.max() * head.w.abs().max()
        assert error(grads.w, dw) < 0.13


@pytest.mark.parametrize("size", [128, 256, 1024, 2816])
def test_no_window_is_too_short_for_a_pair_of_warpgroups(size):
    for total in (*range(1, 700), 1024, 1025, 1088, 1089, 2056, 8200, 8193, 5640):
        cuts = single_pass.float8_cuts(total, size)
        assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])]
        assert cuts[-1].stop == total
        assert all(cut.start % 128 == 0 and cut.stop - cut.start <= size for cut in cuts)
        assert len(cuts) == 1 or size == 128 or all(cut.stop - cut.start >= PAIRED_FROM for cut in cuts)


def test_a_window_that_has_no_room_for_its_list_is_nan_and_lists_nothing(monkeypatch):
    monkeypatch.setattr(single_pass, "ENTRIES", 3)  # rows have more, also when they are swept again
    head = made(40, 200, 16, 0.0)
    head.h[:] = head.h[:1]
    head.w[:20] = head.h[0] / head.h[0].norm() ** 2 * 30
    c = mean_loss(head, ignored=41)
    listed = []

    def seen(*given):
        listed.append(int(given[2].sum()))

    monkeypatch.setattr(single_pass, "fill_entries", seen)
    _, grads = passed(head, c)
    assert listed == [0]
    assert grads.h.isnan().all()  # dw too on a GPU: the interpreter has no NaN in float8


def test_products_that_are_added_to_dw_share_one_memory(monkeypatch):
    assert single_pass.DW_BYTES == FLOAT8_PRODUCT_BYTES  # which the plan counts once
    places = []

    def product(columns, h8, scale, out):
        places.append(out.data_ptr())
        out.fill_(1)

    monkeypatch.setattr(single_pass, "DW_BYTES", 0)
    monkeypatch.setattr(single_pass, "FLOAT8_BLOCK", 32)
    monkeypatch.setattr(single_pass, "largest", lambda *of: torch.ones(()))
    monkeypatch.setattr(single_pass, "transposed_float8", lambda *of, **more: None)
    monkeypatch.setattr(single_pass, "float8_product", product)
    dw = torch.zeros(100, 16)
    single_pass._add_to_weight(torch.zeros(8, 16), torch.zeros(100, 32), torch.ones(8), dw, False)
    assert (dw == 1).all()
    assert len(places) == 4
    assert len(set(places)) == 1

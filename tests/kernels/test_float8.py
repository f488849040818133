"""The float8 single pass against float64, in Triton's interpreter; its sweep is `float8_sweep`'s."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

import float8_sweep

from fusedhead.kernels.contract import Head, HeadGrads, RowGrads, RowStats, Windows
from fusedhead.kernels.transform.transform import Transform
from fusedhead.kernels.triton_engine.float8 import quantize, single_pass
from fusedhead.kernels.triton_engine.float8.class_gradients import PIECE, class_gradients
from tests.kernels.interpreted import F32, error

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.fixture(autouse=True)
def _sweep_on_cpu(monkeypatch):
    monkeypatch.setattr(single_pass, "float8_exponentials", float8_sweep.float8_exponentials)


def made(n: int, v: int, d: int, sharp: float, labels: int = 1, seed: int = 0) -> Head:
    """Logits of standard deviation ``sharp``; a seventh of the labels are one class."""
    draw = torch.Generator().manual_seed(seed)
    h, w = (torch.randn(m, d, generator=draw) for m in (n, v))
    y = torch.randint(0, v, (n, labels), generator=draw)
    y[: n // 7] = 7
    nothing = torch.empty(0)
    return Head(h, w * sharp / d**0.5, y, nothing[None], nothing[None], nothing, Transform())


def mean_loss(head: Head, ignored: int = 17) -> RowGrads:
    """The coefficients of a mean cross-entropy that leaves out every ``ignored``-th token."""
    keep = (torch.arange(len(head.h)) % ignored != 3).float()
    c = keep / keep.sum()
    return RowGrads(c, -c[:, None] if head.y.shape[1] else None)


def passed(head: Head, c: RowGrads, tokens: int = 256, rows: int = 128) -> tuple[RowStats, HeadGrads]:
    return single_pass.one_float8_pass(head, c, Windows(tokens, len(head.w), F32, rows))


def true(head: Head, c: RowGrads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """lse, dh, dw in float64."""
    h, w = head.h.double(), head.w.double()
    z = h @ w.t()
    lse = z.logsumexp(1)
    a = c.lse.double()
    if c.square is not None:
        a = a + 2 * c.square.double() * lse
    dz = (z - lse[:, None]).exp() * a[:, None]
    if c.picked is not None:
        dz.scatter_add_(1, head.y, c.picked.double())
    return lse, dz @ w, dz.t() @ h


def eager_errors(head: Head, c: RowGrads) -> tuple[float, float]:
    """Errors of dh and dw of eager PyTorch in bfloat16, whose products are otherwise exact."""
    _, dh, dw = true(head, c)
    h, w = head.h.bfloat16(), head.w.bfloat16()
    dz = (h.float() @ w.float().t()).bfloat16().float().softmax(1) * c.lse[:, None]
    dz = dz.scatter_add(1, head.y, c.picked).bfloat16().double()
    return error((dz @ w.double()).bfloat16(), dh), error((dz.t() @ h.double()).bfloat16(), dw)


@pytest.mark.parametrize(("tokens", "rows"), [(256, 128), (128, 128)])
def test_gradients_err_less_than_those_of_eager_bfloat16(tokens, rows):
    head = made(140, 300, 32, 5.0)
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


def test_a_z_loss_and_a_head_without_labels():
    for labels in (0, 1):
        head = made(60, 300, 32, 4.0, labels)
        c = mean_loss(head)._replace(square=torch.full((60,), 1e-4))
        _, grads = passed(head, c)
        _, dh, dw = true(head, c)
        assert error(grads.h, dh) < 6e-3
        assert error(grads.w, dw) < 6e-3


def test_a_certain_label_leaves_no_rounding_of_it():
    head = made(40, 200, 32, 0.3)
    head.w[head.y[:, 0]] = 0
    head = head._replace(y=torch.arange(40)[:, None])
    head.w[:40] = 40 * torch.nn.functional.normalize(head.h, dim=1)  # p of the label is 1 to all digits in most rows
    c = mean_loss(head)
    _, grads = passed(head, c)
    _, dh, _ = true(head, c)
    assert (grads.h.double() - dh).abs().max() < 1e-6


def test_rows_whose_level_is_far_off_are_swept_again(monkeypatch):
    head = made(150, 300, 32, 6.0)
    c = mean_loss(head)
    swept = []
    sweep = single_pass.float8_exponentials

    def counted(*args, **kwargs):
        flags = args[7] if len(args) > 7 else None
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
    head = made(60, 300, 32, 4.0)
    head.h[5, 3] = bad
    c = mean_loss(head)
    stats, grads = passed(head, c)
    _, dh, _ = true(head, c)
    others = torch.arange(60) != 5
    assert stats.lse[others].isfinite().all()
    assert grads.h[5].isnan().all()
    assert error(grads.h[others], dh[others]) < 4e-3
    assert grads.w.isnan().all()  # as eager's: every class has that row in its sum


def test_an_infinite_weight_reaches_its_column_of_dh():
    head = made(60, 300, 32, 4.0)
    head.h[:, 3] = head.h[:, 3].abs() + 0.1
    head.w[11, 3] = float("-inf")  # a class that no row can have
    head.y[head.y == 11] = 12
    c = mean_loss(head)
    _, grads = passed(head, c)
    assert grads.h[:, 3].isnan().all()
    assert grads.h[:, :3].isfinite().all()


def test_tokens_and_classes_are_transposed_in_the_order_of_the_sweep():
    x, weight = torch.randn(200, 48), torch.rand(200)
    top = quantize.largest(x, weight)
    assert top == (x * weight[:, None]).abs().max()
    for tokens, order in ((False, float8_sweep.classes_in_order(200)), (True, float8_sweep.tokens_in_order(200))):
        out = torch.full((48, 256), 1.0).to(torch.float8_e4m3fn)
        quantize.transposed_float8(x, top, out, weight, tokens)
        scaled = torch.zeros(256, 48)
        scaled[:200] = x * (448 / top * weight)[:, None]
        got, want = out[:, : len(order)].float(), scaled[order].t()
        carried = want.abs() / want.abs().log2().floor().exp2() > 1.9  # the interpreter rounds 125 to 64
        assert torch.allclose(got.where(~carried, 0), want.where(~carried, 0), rtol=2**-4, atol=2**-9)
        back = (quantize_place(v) for v in range(64))
        assert tokens or [int(order[q]) for q in back] == list(range(64))


def quantize_place(v: int) -> int:
    """`quantize.place_of` in Python."""
    return 16 * (v // 2 % 4) + 2 * (v // 8) + v % 2


def test_classes_with_any_number_of_entries_are_added_up():
    """None, some, a whole piece, several pieces, and what begins and ends within them."""
    n, d, vocab = 64, 24, 40
    counts = [0, 3, PIECE - 3, 2, 1, 2 * PIECE + 7, PIECE, 5, 1, 1, PIECE - 14, 4 * PIECE, 6]
    classes = torch.cat([torch.full((count,), 2 * at) for at, count in enumerate(counts)])
    room = -(-len(classes) // PIECE) * PIECE + PIECE
    classes = torch.cat((classes, torch.full((room - len(classes),), vocab)))
    order = torch.randperm(room)
    classes = classes[order].int()
    values, tokens = torch.randn(room), torch.randint(0, n, (room,), dtype=torch.int32)
    h, dw = torch.randn(n, d), torch.randn(vocab, d)
    there = classes < vocab
    want = dw.double().index_add(0, classes[there].long(), (values[:, None] * h[tokens.long()])[there].double())
    class_gradients(classes, values, tokens, h, dw)
    assert error(dw, want) < 1e-6

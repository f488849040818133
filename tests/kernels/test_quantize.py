"""Float8 copies of operands: transposed, in the order of the sweep that stores what they meet."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: tests/gpu", allow_module_level=True)

import float8_sweep

from fusedhead.kernels.triton_engine.float8 import quantize

# numpy speaks up where a GPU stays silent
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


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


def test_what_is_not_finite_does_not_scale_the_rest():
    x = torch.randn(130, 48)
    x[3, 5], x[7, 9] = float("inf"), float("nan")
    finite = torch.where(x.isfinite(), x, 0)
    top = quantize.largest(x)
    assert top == finite.abs().max()
    out = torch.zeros((48, 256)).to(torch.float8_e4m3fn)
    quantize.transposed_float8(x, top, out, tokens=True)
    whole = torch.zeros((48, 256)).to(torch.float8_e4m3fn)
    quantize.transposed_float8(finite, top, whole, tokens=True)
    order = float8_sweep.tokens_in_order(130)
    others = torch.nn.functional.pad(x.isfinite(), (0, 0, 0, 126), value=True)[order].t()
    assert torch.equal(out.float()[others], whole.float()[others])  # NaN itself: the interpreter has none in float8


def test_a_matrix_of_zeros_stays_one():
    x = torch.zeros(64, 48)
    out = torch.ones((48, 64)).to(torch.float8_e4m3fn)
    quantize.transposed_float8(x, quantize.largest(x), out)
    assert not out.float().any()

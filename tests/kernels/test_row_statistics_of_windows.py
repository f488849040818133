"""Windows that take row statistics from the kernel, in Triton's interpreter: errors are those of eager code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here: tests/gpu/test_token_programs_on_cuda.py", allow_module_level=True)

from fusedhead.kernels.tokenwise import compilation, engine, gradient_sums
from fusedhead.kernels.tokenwise.program import read

N, V, D = 24, 50, 16
BESIDE_THE_LOSS = (
    "v0 = head(r0, t1, t2, r3, 'round:bfloat16', float32); "
    "v1 = cross_entropy_loss.default(v0, r8, None, reduction=0, ignore_index=-100, label_smoothing=0.0); "
    "v2 = head(r4, t5, t6, r7, 'round:bfloat16 mul:0.5', float32); v3 = softmax.int(v2, 1, float32); "
    "v4 = xlogy.Tensor(v3, v3); v5 = div.Tensor(v0, 2); v6 = log_softmax.int(v5, 1); v7 = mul.Tensor(v3, v6); "
    "v8 = sub.Tensor(v4, v7); v9 = sum.dim_IntList(v8, [1], True, dtype=float32); return v1, v9"
)


def eager(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor, y: Tensor, c: Tensor) -> list[Tensor]:
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    z, t = F.linear(h, w).to(wide), (F.linear(ht, wt).to(wide) / 2).softmax(-1)
    loss = F.cross_entropy(z, y, reduction="none")
    divergence = F.kl_div(F.log_softmax(z / 2, -1), t, reduction="none").sum(1, keepdim=True)
    grads = torch.autograd.grad((loss * c[:, 0] + divergence[:, 0] * c[:, 1]).sum(), (h, w))
    return [loss.detach(), divergence.detach(), *grads]


@pytest.mark.parametrize("group", [1, 2, 6])
def test_the_error_is_at_most_that_of_eager_code(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    statistics = compilation.row_statistics
    monkeypatch.setattr(compilation, "_MADE", {})
    monkeypatch.setattr(compilation, "row_statistics_serve", lambda x: x.shape == (4, V) and x.dtype == torch.bfloat16)
    monkeypatch.setattr(compilation, "row_statistics", lambda found, x: made.append(len(found)) or statistics(found, x))
    monkeypatch.setattr(gradient_sums, "adds_in_epilogue", lambda device: True)
    torch.manual_seed(0)
    h, ht = (torch.randn(N, D).bfloat16() for _ in range(2))
    w, wt = (2 * torch.randn(V, D).bfloat16() for _ in range(2))
    y, c = torch.randint(0, V, (N,)), torch.rand(N, 2)
    y[5] = -100
    extra = [torch.empty(0, V), torch.empty(N, 0)]
    tensors = [h, w, *extra, ht, wt, *extra, y]
    needs = [at < 2 for at in range(9)]
    coefficients = [c[:, 0].contiguous(), c[:, 1:].contiguous()]
    results, grads = engine.head_rows_loss(read(BESIDE_THE_LOSS), coefficients, tensors, needs, 4, True, False, group)
    assert set(made) == {3}, "the student's at two temperatures, and the teacher's"
    truth = eager(*(x.double() for x in (h, w, ht, wt)), y, c.double())
    for ours, theirs, right in zip([*results, *grads[:2]], eager(h, w, ht, wt, y, c), truth):
        assert ours is not None
        assert (ours - right).norm() <= 1.03 * (theirs - right).norm() + 1e-6 * right.norm()

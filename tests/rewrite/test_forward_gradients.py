"""Forward gradients: a loss linear in the results of a head gets its gradients in the forward, others do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.programs.claims import D, V, hidden, weight
from tests.rewrite.divergences import calls, distillation, reverse_kl


def test_a_row_program_whose_loss_is_linear_gets_its_gradients_in_the_forward() -> None:
    teacher = hidden().detach(), weight().detach()
    assert calls(distillation, hidden(), weight(), *teacher, fused=2) == ["head_rows_loss"]
    assert calls(reverse_kl, hidden(), weight(), *teacher, fused=2) == ["head_rows_loss"]


def test_results_that_enter_their_own_gradient_are_computed_again() -> None:
    def program(h: Tensor, w: Tensor, q: Tensor) -> Tensor:
        return (F.linear(h, w).log_softmax(-1) * q).sum(-1).square().mean()

    inputs = hidden(6, D), weight(), torch.rand(6, V)
    assert calls(program, *inputs) == ["head_rows"]
    rewritten = Rewritten(program)
    rewritten(*inputs)
    assert "again in the backward (it is not linear in the per-row results" in rewritten.report.heads[0].engine


def test_no_gradient_is_taken_early_before_a_loss_scale_is_known() -> None:
    def program(h: Tensor, w: Tensor, q: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), q)

    half = torch.float16
    inputs = hidden(6, D).detach().to(half).requires_grad_(), weight().detach().to(half), torch.rand(6, V, dtype=half)
    rewritten = Rewritten(program)
    rewritten(*inputs)
    assert "would underflow" in rewritten.report.heads[0].engine

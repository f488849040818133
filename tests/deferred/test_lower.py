"""Losses as public training code writes them outside of the compiled model: answered by the fused ops, equally right.

Each function is our own rendering of a form in patterns of litgpt, Transformers, TRL, torchtune, torchtitan,
lm-evaluation-harness; none may make a tensor of the logits' size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.deferred.heads import Model, V, compare, deferring, tokens
from tests.deferred.outside_losses import FORMS, IN_THE_FORWARD, Y, shifted_by_slicing


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_loss_outside_is_answered_by_the_fused_ops(form: Callable[[Tensor], Tensor]) -> None:
    ran = compare(Model(), form, tokens())
    assert ran.fused == FORMS[form]
    assert ran.large == []


def cap(z: Tensor) -> Tensor:
    return 30 * torch.tanh(z / 30)


def test_what_the_model_does_to_its_logits_goes_along() -> None:
    ran = compare(Model(lambda z: cap(z).float()), shifted_by_slicing, tokens())
    assert (ran.fused, ran.large) == (IN_THE_FORWARD, [])


def test_log_probabilities_that_are_returned_are_deferred_too() -> None:
    model = Model(lambda z: F.log_softmax(z, -1))
    ran = compare(model, lambda lp: F.nll_loss(lp.view(-1, V), Y.view(-1)), tokens())
    assert (ran.fused, ran.large) == (IN_THE_FORWARD, [])


def test_a_frozen_head_gets_no_gradient() -> None:
    model = Model()
    model.lm_head.requires_grad_(False)
    ran = compare(model, shifted_by_slicing, tokens())
    assert (ran.fused, ran.large) == (IN_THE_FORWARD, [])


def test_bfloat16_is_as_right_as_eager() -> None:
    model, x = Model(dtype=torch.bfloat16), tokens()
    truth = shifted_by_slicing(Model.forward(model.double(), x))
    model.bfloat16()
    eager = shifted_by_slicing(model(x))
    fused = shifted_by_slicing(deferring(model)(x))
    assert fused.dtype == eager.dtype
    assert abs(fused.double() - truth) <= abs(eager.double() - truth) + 1e-3

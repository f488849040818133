"""Traps of which weight: tied, computed, sliced, frozen, replaced by hooks or adapters.

Where the pass reads the program it is right; where it does not, it leaves the head and says why.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.programs.claims import D, V, hidden, labels, left, right, unseen, weight


def test_a_tied_weight_gets_both_gradients() -> None:
    def program(w: Tensor, ids: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(torch.tanh(F.embedding(ids, w)), w), y)

    right(program, weight(), labels(6), labels(6))


@pytest.mark.parametrize(
    "made",
    [
        lambda w: F.normalize(w, dim=-1), lambda w: w * 0.5, lambda w: w.to(torch.float32), lambda w: w[:V],
        lambda w: w.clone(), lambda w: torch.cat([w[:4], w[4:]]), lambda w: w + w.mean(0),
        lambda w: w.t().contiguous().t(),
        lambda w: w.view(V, 2, -1).flatten(1), lambda w: w.unsqueeze(0)[0], lambda w: w.detach(),
    ],
)  # fmt: skip
def test_a_weight_may_be_any_value_of_the_graph(made) -> None:  # type: ignore[no-untyped-def]
    right(lambda h, w, y: F.cross_entropy(F.linear(h, made(w)), y), hidden(6, D), weight(), labels(6))


def test_a_weight_stored_the_other_way_round_is_right() -> None:
    right(lambda h, w, y: F.cross_entropy(h @ w, y), hidden(6, D), weight(D, V), labels(6))


def test_a_weight_with_strides_is_right() -> None:
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w[:, ::2]), y), hidden(6, D), weight(V, 2 * D), labels(6))


def test_one_of_many_weights_is_right() -> None:
    right(lambda h, w, y: F.cross_entropy(h @ w[1].T, y), hidden(6, D), weight(3, V, D), labels(6))


def test_a_weight_normalised_by_a_parametrisation_is_right() -> None:
    head = torch.nn.utils.parametrizations.weight_norm(nn.Linear(D, V))
    right(lambda h, y: F.cross_entropy(head(h), y), hidden(6, D), labels(6))


def test_a_forward_hook_on_the_head_is_part_of_it() -> None:
    head = nn.Linear(D, V)
    head.register_forward_hook(lambda module, args, result: result * 2)
    right(lambda h, y: F.cross_entropy(head(h), y), hidden(6, D), labels(6))


def test_a_replaced_forward_is_what_is_called() -> None:
    head = nn.Linear(D, V)
    head.forward = lambda x: F.linear(x.float(), head.weight.float() * 0.1)  # type: ignore[method-assign]
    right(lambda h, y: F.cross_entropy(head(h), y), hidden(6, D), labels(6))


@pytest.mark.parametrize(("h_learns", "w_learns", "b_learns"), list(itertools.product([True, False], repeat=3)))
def test_frozen_parts_want_no_gradient(h_learns: bool, w_learns: bool, b_learns: bool) -> None:
    h, w, b = hidden(6, D), weight(), weight(V)
    for part, learns in ((h, h_learns), (w, w_learns), (b, b_learns)):
        part.requires_grad_(learns)
    right(lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y), h, w, b, labels(6))


def test_inference_mode_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        with torch.inference_mode():
            return F.cross_entropy(F.linear(h, w), y)

    right(program, torch.randn(6, D), torch.randn(V, D), labels(6))


@pytest.mark.parametrize("shape", [(V,), (1, V)])
@pytest.mark.parametrize("learns", [True, False])
def test_a_bias_is_right_in_every_spelling(shape: tuple[int, ...], learns: bool) -> None:
    def program(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w) + b
        z += b
        return F.cross_entropy(z, y)

    right(program, hidden(6, D), weight(), weight(*shape).requires_grad_(learns), labels(6))


def test_a_bias_that_varies_by_token_in_addmm_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.addmm(b, h, w.t()), y)

    left(program, hidden(6, D), weight(), hidden(6, V), labels(6), because="varies from token to token")


def test_a_weight_of_three_dimensions_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy((h @ w).flatten(0, 1), y)

    left(program, hidden(2, 3, D), weight(2, D, V), labels(6), because="is not a two-dimensional weight")


def test_a_weight_that_is_logits_itself_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z @ z.t(), y) + F.cross_entropy(z, y)

    left(program, hidden(6, D), weight(), labels(6, high=6), because="is not a two-dimensional weight")


def test_operands_of_different_dtypes_raise_as_in_eager_code() -> None:
    from tests.eager_stack import Rewritten

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h.bfloat16(), w), y)

    arguments = hidden(6, D), weight(), labels(6)
    with pytest.raises(RuntimeError):
        program(*arguments)
    with pytest.raises(RuntimeError):
        Rewritten(program)(*arguments)


def test_a_head_of_two_classes_is_right() -> None:
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), hidden(6, D), weight(2, D), labels(6, high=2))


def test_a_head_of_one_class_is_right() -> None:
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), hidden(6, D), weight(1, D), labels(6, high=1))


def test_a_logit_read_out_beside_the_loss_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z, y) + z[:, 0].mean()

    right(program, hidden(6, D), weight(), labels(6))


def test_a_weight_cast_from_another_dtype_gets_its_gradient_in_it() -> None:
    w = weight().detach().double().requires_grad_()
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w.type_as(h)), y), hidden(6, D), w, labels(6))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_normalised_by_a_hook_is_right() -> None:
    head = torch.nn.utils.weight_norm(nn.Linear(D, V))
    right(lambda h, y: F.cross_entropy(head(h), y), hidden(6, D), labels(6))


def test_a_hook_before_the_head_is_part_of_it() -> None:
    head = nn.Linear(D, V)
    head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    right(lambda h, y: F.cross_entropy(head(h), y), hidden(6, D), labels(6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_product_in_another_dtype_is_left_alone(dtype: torch.dtype) -> None:
    h, w = (torch.randint(-3, 3, shape).to(dtype) for shape in ((6, D), (V, D)))
    left(lambda h, w, y: F.cross_entropy(F.linear(h, w).float(), y), h, w, labels(6), because=f"computed in {dtype}")


def test_a_sparse_or_complex_weight_is_not_seen() -> None:
    sparse = torch.randn(V, D).to_sparse()
    unseen(lambda h, w, y: F.cross_entropy(torch.sparse.mm(w, h.t()).t(), y), torch.randn(6, D), sparse, labels(6))
    h, w = torch.randn(6, D, dtype=torch.complex64), torch.randn(V, D, dtype=torch.complex64)
    unseen(lambda h, w, y: F.cross_entropy(F.linear(h, w).real, y), h, w, labels(6))


def test_rows_and_weights_that_are_one_row_expanded_are_right() -> None:
    right(lambda h, w, y: F.cross_entropy(F.linear(h.expand(6, D), w), y), hidden(1, D), weight(), labels(6))
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w.expand(V, D)), y), hidden(6, D), weight(1, D), labels(6))

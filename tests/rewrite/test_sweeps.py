"""Sweeps: which terminals one pass over the vocabulary serves, and which sweeps are batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.rewrite.sweeps import Batch, batches, is_squared
from tests.programs.claims import D, V, hidden, labels, weight
from tests.rewrite.sites import site_in


def batches_of(program: Callable[..., Any], *more: Tensor) -> list[Batch]:
    body, site = site_in(program, hidden(6, D), weight(), labels(6), *more)
    return batches([site], body.facts)


def sizes(found: list[Batch]) -> list[list[int]]:
    """The number of terminals of each group of each batch."""
    return [[len(group.terminals) for group in batch] for batch in found]


def test_a_loss_and_an_accuracy_of_the_same_rows_share_a_sweep() -> None:
    found = batches_of(
        lambda h, w, y: (F.cross_entropy((z := F.linear(h, w)), y), (z.argmax(-1) == y).float().mean(), z.logsumexp(-1))
    )
    assert sizes(found) == [[3]]
    ((group,),) = found
    assert group.want == ["lse", "picked", "argmax", "lse_low"]
    assert len(group.labels) == len(group.picks) == 1
    assert group.weights is None


def test_other_steps_are_another_sweep() -> None:
    assert sizes(batches_of(lambda h, w, y: F.cross_entropy((z := F.linear(h, w)), y) + F.cross_entropy(2 * z, y))) == [
        [1],
        [1],
    ]


def test_rows_apart_are_one_batch_of_two_groups() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z[:3], y[:3]) + F.cross_entropy(z[3:], y[3:])

    assert sizes(batches_of(program)) == [[1, 1]]


def test_a_sum_with_other_weights_is_another_sweep() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z, y, a, label_smoothing=0.1) + F.cross_entropy(z, y, b, label_smoothing=0.1)

    assert len(batches_of(program, torch.rand(V), torch.rand(V))) == 2


def test_a_squared_lse_is_not_batched() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return z[:3].logsumexp(-1).square().sum() + z[3:].logsumexp(-1).square().sum()

    found = batches_of(program)
    assert sizes(found) == [[1], [1]]
    assert all(is_squared(node) for (group,) in found for node, _ in group.terminals)


def test_a_product_with_itself_is_a_square_and_one_with_another_value_is_not() -> None:
    graph = torch.fx.Graph()
    x, y, z = (graph.placeholder(name) for name in "xyz")
    graph.call_function(torch.mul, (x, x))
    graph.call_function(torch.mul, (y, x))
    graph.call_method("pow", (z, 2))
    assert [is_squared(node) for node in (x, y, z)] == [True, False, True]


def test_labels_that_are_computed_after_the_first_loss_are_moved_before_it() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        first = F.cross_entropy(z, y)
        return first + F.cross_entropy(z, (y + 1) % V)

    assert sizes(batches_of(program)) == [[2]]


def test_labels_that_are_written_after_the_first_loss_keep_their_sweep() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        first = F.cross_entropy(z, y)
        y.zero_()
        return first + F.cross_entropy(z, y + 1)

    assert sizes(batches_of(program)) == [[1], [1]]

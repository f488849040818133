"""Logits: steps round where the program rounds, a detached value stays detached, equal rows have equal keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import (
    HIDDEN,
    Logits,
    LogProbs,
    Projection,
    RowStep,
    detached,
    from_the_first,
    logits_of,
    piece_of,
    row_identity,
    rows_of_hidden,
    same_logits,
    sources_of,
)
from fusedhead.kernels.transform.transform import Step

aten = torch.ops.aten
N, D, V = 6, 4, 11
GRAPH = Graph()


def plain(name: str, *shape: int) -> Plain:
    return Plain(GRAPH.placeholder(name), torch.empty(shape))


def logits(dtype: torch.dtype = torch.float32, **fields: Any) -> Logits:
    head = Projection(GRAPH.placeholder("z"), plain("h", N, D), plain("w", V, D), dtype)
    return Logits(head, torch.empty(N, V, dtype=dtype), 1, **fields)


def run(x: Any) -> Any:
    """The value of an expression over real tensors."""
    return x.op(*map(run, x.args)) if isinstance(x, Expr) else x


@pytest.mark.parametrize(("dtype", "names"), [(torch.float32, ["mul"]), (torch.bfloat16, ["mul", "round"])])
def test_a_step_rounds_where_its_result_has_a_low_precision(dtype: torch.dtype, names: list[str]) -> None:
    z = logits(dtype)
    assert [step.op for step in z.step(z.val, Step("mul", "2.0")).steps] == names


def test_a_value_is_detached_until_a_vector_is_added() -> None:
    z = logits()
    still = detached(z)
    assert not z.has_no_gradient
    assert still.has_no_gradient
    assert not replace(still, cols=(plain("bias", V),)).has_no_gradient
    assert logits_of(detached(LogProbs(z, z.val))).has_no_gradient
    assert detached("anything else") == "anything else"


def test_views_that_keep_the_order_of_rows_do_not_tell_logits_apart() -> None:
    z, sliced = logits(), RowStep(aten.slice.Tensor, (0, 1, 5))
    view = RowStep(aten.view.default, ([2, 3, HIDDEN],), keeps_order=True)
    assert row_identity(replace(z, row_steps=(view,))) == row_identity(z)
    assert row_identity(replace(z, row_steps=(sliced,))) != row_identity(z)
    assert row_identity(replace(z, row_steps=(view, sliced))) != row_identity(replace(z, row_steps=(sliced,)))
    assert same_logits(z, replace(z, row_steps=(view,)))
    assert same_logits(z, replace(z, steps=(Step("round", "bfloat16"),)))
    assert not same_logits(z, replace(z, steps=(Step("mul", "2.0"),)))
    assert not same_logits(z, logits())  # of another product


def test_row_steps_are_replayed_on_hidden_states_with_their_width() -> None:
    z = logits(row_steps=(RowStep(aten.view.default, ([2, 3, HIDDEN],)), RowStep(aten.select.int, (0, 1))))
    rows = rows_of_hidden(z)
    assert rows.op is aten.select.int
    assert rows.args[1:] == (0, 1)
    assert rows.args[0].args[1] == [2, 3, D]
    assert rows_of_hidden(logits()).name.startswith("h")


def test_a_sweep_reads_the_head_and_its_vectors() -> None:
    bias = plain("bias", V)
    z = logits(cols=(bias,))
    assert set(sources_of(z)) == {z.head.hidden.ref, z.head.weight.ref, bias.ref}
    assert all(isinstance(node, Node) for node in sources_of(z))


def test_a_piece_of_the_vocabulary_slices_its_vectors() -> None:
    (piece,) = piece_of((Plain(torch.arange(V), torch.empty(V)),), 3, 7)
    assert run(piece.ref).tolist() == [3, 4, 5, 6]
    assert piece.val.shape == (4,)


def test_negative_numbers_count_from_the_end() -> None:
    index = torch.tensor([0, -1, 5, -6, 9])
    assert run(from_the_first(index, 6)).tolist() == [0, 5, 5, 0, 9]

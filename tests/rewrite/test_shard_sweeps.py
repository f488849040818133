"""Sweeps of heads in shards: operands of the whole vocabulary become this rank's part, and ranks agree by a text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.fx import Graph, Node

from fusedhead.ir.builder import Emit
from fusedhead.ir.logits import Logits, RowStep
from fusedhead.rewrite.shard_sweeps import facts_of, from_own, own_rows

aten = torch.ops.aten
WHOLE = torch.ops.fusedhead.whole_vocab.default
V, D, FIRST, OWN = 12, 4, 3, 5


class Program:
    """This rank's rows of a weight and of a bias, what stands for the whole of each, and a vector of all classes."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.shard, self.part = self.given("shard", OWN, D), self.given("part", OWN)
        self.vector = self.given("vector", V)
        self.weight, self.bias = (
            self.call(WHOLE, x, FIRST, V, "0", True, False, shape=(V, *x.meta["example_value"].shape[1:]))
            for x in (self.shard, self.part)
        )
        self.output = self.graph.output((self.weight, self.bias))

    def given(self, name: str, *shape: int) -> Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = torch.zeros(shape)
        return node

    def call(self, op: Any, *args: Any, shape: tuple[int, ...] = ()) -> Node:
        node = self.graph.call_function(op, args)
        values = (x.meta["example_value"] if isinstance(x, Node) else x for x in args)
        node.meta["example_value"] = torch.zeros(shape) if shape else op(*values)
        return node


@pytest.fixture
def program() -> Program:
    return Program()


def emit_in(program: Program) -> Emit:
    emit = Emit(program.graph)
    emit.anchor = emit.trace_of = program.output
    return emit


def test_what_stands_for_the_whole_is_this_rank_s_part(program: Program) -> None:
    emit = emit_in(program)
    assert own_rows(emit, program.weight, program.weight) is program.shard
    assert own_rows(emit, program.bias, program.weight) is program.part
    assert emit.nodes == []


def test_steps_that_keep_entries_in_their_places_are_taken_on_the_part(program: Program) -> None:
    with program.graph.inserting_before(program.output):
        cast = program.call(aten.to.dtype, program.bias, torch.float64)
        flat = program.call(aten.reshape.default, cast, [-1])
    emit = emit_in(program)
    own = own_rows(emit, flat, program.weight)
    assert own.target is aten.reshape.default
    assert own.args[0].target is aten.to.dtype  # type: ignore[union-attr]
    assert own.all_input_nodes[0].all_input_nodes == [program.part]
    assert own.meta["example_value"].shape == (OWN,)


def test_a_vector_of_all_classes_is_sliced(program: Program) -> None:
    emit = emit_in(program)
    own = own_rows(emit, program.vector, program.weight)
    assert own.args == (program.vector, 0, FIRST, FIRST + OWN)
    assert own.meta["example_value"].shape == (OWN,)


def test_a_step_that_moves_entries_is_not_taken_on_the_part(program: Program) -> None:
    with program.graph.inserting_before(program.output):
        turned = program.call(aten.flip.default, program.bias, [0])
        matrix = program.call(aten.reshape.default, program.weight, [-1])
    emit = emit_in(program)
    assert from_own(emit, turned) is None
    assert from_own(emit, matrix) is None  # rows of a matrix do not stay in their places


def test_equal_steps_on_rows_have_equal_texts() -> None:
    steps = (RowStep(aten.slice.Tensor, (0, 1, 5)), RowStep(aten.view.default, ([2, 2],)))
    logits = Logits(Mock(), torch.empty(4, V), 1, row_steps=steps)
    assert facts_of(logits) == facts_of(replace(logits, row_steps=tuple(replace(step) for step in steps)))
    assert facts_of(logits) != facts_of(replace(logits, row_steps=steps[:1]))

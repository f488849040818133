"""Edits: what nobody reads goes with its inputs, a copy is a graph of its own, and every edit is counted."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.graph.edit import any_still_computed, copy_module, counting_edits, erase, replace_node
from fusedhead.graph.nodes import fake, name_of
from tests.graph.dynamo import dynamo_graph, node_called


def program(x: Tensor) -> tuple[Tensor, Tensor]:
    used = x.exp()
    return used.sin().cos(), used


def test_what_nobody_reads_goes_with_those_inputs_that_lose_their_last_reader() -> None:
    gm = dynamo_graph(program, torch.ones(3))
    kept, last = node_called(gm, "exp"), node_called(gm, "cos")
    last.replace_all_uses_with(kept)
    erase([last], lambda node: node.op != "placeholder")
    assert [name_of(node) for node in gm.graph.nodes if name_of(node)] == ["exp"]
    gm.graph.lint()


def test_nothing_goes_that_may_not() -> None:
    gm = dynamo_graph(program, torch.ones(3))
    last = node_called(gm, "cos")
    last.replace_all_uses_with(node_called(gm, "exp"))
    erase([last], lambda node: name_of(node) == "cos")
    assert {name_of(node) for node in gm.graph.nodes} >= {"exp", "sin"}


def test_a_replaced_node_is_gone_and_no_longer_computed() -> None:
    gm = dynamo_graph(program, torch.ones(3))
    old, new = node_called(gm, "sin"), node_called(gm, "exp")
    assert any_still_computed([old])
    replace_node(old, new)
    assert not any_still_computed([old])
    assert node_called(gm, "cos").args == (new,)


def test_a_copy_is_edited_without_the_original_and_shares_its_values() -> None:
    gm = dynamo_graph(program, torch.ones(3))
    names = [node.name for node in gm.graph.nodes]
    copy = copy_module(gm)
    assert fake(node_called(copy, "exp")) is fake(node_called(gm, "exp"))
    replace_node(node_called(copy, "sin"), node_called(copy, "exp"))
    copy.recompile()
    assert [node.name for node in gm.graph.nodes] == names
    x = torch.ones(3)
    assert torch.equal(copy(x)[0], x.exp().cos())
    assert torch.equal(gm(x)[0], x.exp().sin().cos())


def test_nodes_made_and_erased_are_counted_inside_only() -> None:
    gm = dynamo_graph(program, torch.ones(3))
    counted: list[str] = []
    with counting_edits(gm.graph, lambda node: counted.append(node.name)) as known:
        replace_node(node_called(gm, "sin"), node_called(gm, "exp"))
        with gm.graph.inserting_before(node_called(gm, "cos")):
            result = gm.graph.call_function(torch.neg, (node_called(gm, "exp"),))
    if known:  # a torch without these hooks says so
        assert len(counted) == 2
    gm.graph.erase_node(result)
    assert len(counted) == 2 * known

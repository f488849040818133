"""Facts of a graph: modes at every node, and the first write to the memory of a tensor in a stretch of the graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from fusedhead.graph.facts import GraphFacts
from tests.graph.dynamo import dynamo_graph, node_called


def modes(x: Tensor) -> Tensor:
    a = x.exp()
    with torch.no_grad():
        b = x.sin()
        with torch.autocast("cpu", torch.bfloat16):
            c = x.cos()
    return a + b + c + x.tan()


def test_a_node_has_the_modes_of_its_place() -> None:
    gm = dynamo_graph(modes, torch.ones(3, requires_grad=True))
    facts = GraphFacts(gm.graph, grad=True)
    grads = {name: facts.grad_mode(node_called(gm, name)) for name in ("exp", "sin", "cos", "tan")}
    assert grads == {"exp": True, "sin": False, "cos": False, "tan": True}
    regions = {name: len(facts.autocast(node_called(gm, name))) for name in ("exp", "sin", "cos", "tan")}
    assert regions == {"exp": 0, "sin": 0, "cos": 1, "tan": 0}


def test_modes_are_live_and_answer_for_nodes_that_were_made_since() -> None:
    gm = dynamo_graph(modes, torch.ones(3, requires_grad=True))
    facts = GraphFacts(gm.graph, grad=True)
    assert facts.grad_mode(node_called(gm, "exp"))
    with gm.graph.inserting_after(node_called(gm, "sin")):
        result = gm.graph.call_function(torch.neg, (node_called(gm, "exp"),))
    assert not facts.grad_mode(result)


def writing(x: Tensor, y: Tensor) -> Tensor:
    a = x.exp()
    view = a[1:]
    b = a.sin()
    view.mul_(2)  # a changes through its view
    y.add_(1)
    return b + a.cos() + y


def graph_that_writes() -> tuple[GraphModule, GraphFacts]:
    gm = dynamo_graph(writing, torch.ones(4), torch.ones(4))
    return gm, GraphFacts(gm.graph)


def test_a_write_through_a_view_is_a_write_to_the_tensor() -> None:
    gm, facts = graph_that_writes()
    exp, sin, cos = (node_called(gm, name) for name in ("exp", "sin", "cos"))
    assert facts.write_between(exp, sin, [exp]) is None
    write = facts.write_between(exp, cos, [exp])
    assert write is not None
    assert (write.writer.target, write.tensor) == (node_called(gm, "mul_").target, exp)


def test_a_write_to_other_memory_is_none() -> None:
    gm, facts = graph_that_writes()
    exp, sin, cos = (node_called(gm, name) for name in ("exp", "sin", "cos"))
    assert facts.write_between(exp, cos, [sin]) is None
    assert facts.write_after(exp, [sin]) is None


def test_the_last_node_of_a_stretch_is_outside_of_it() -> None:
    gm, facts = graph_that_writes()
    exp, writer = node_called(gm, "exp"), node_called(gm, "mul_")
    assert facts.write_between(exp, writer, [exp]) is None
    write = facts.write_after(writer, [exp])
    assert write is not None
    assert write.writer is writer


def test_what_was_kept_describes_the_graph_before_the_rewrite() -> None:
    gm, facts = graph_that_writes()
    exp, cos, writer = (node_called(gm, name) for name in ("exp", "cos", "mul_"))
    facts.keep(exp)
    gm.graph.erase_node(writer)
    facts.refresh()  # does nothing any more
    write = facts.write_between(exp, cos, [exp])
    assert write is not None
    assert write.writer is writer


def test_calls_are_found_by_the_name_of_their_op_in_the_order_of_the_graph() -> None:
    gm = dynamo_graph(modes, torch.ones(3, requires_grad=True))
    facts = GraphFacts(gm.graph)
    assert [node.name for node in facts.named({"tan", "cos", "exp", "add"})][:2] == ["a", "c"]
    assert facts.named({"log_softmax"}) == facts.named(()) == []
    with gm.graph.inserting_after(node_called(gm, "sin")):
        result = gm.graph.call_function(torch.log_softmax, (node_called(gm, "exp"), 0))
    assert facts.named({"log_softmax"}) == []
    facts.refresh()
    assert facts.named({"log_softmax"}) == [result]

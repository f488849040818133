"""One node as ATen ops: all spellings of an op become the same overloads, and equal nodes share a trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedhead.graph.nodes import name_of
from fusedhead.graph.tracing import Traces, trace, trace_key
from tests.graph.dynamo import dynamo_graph, node_called

LAST: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda x: x.log_softmax(-1),
    "function": lambda x: torch.log_softmax(x, -1),
    "of nn.functional": lambda x: torch.nn.functional.log_softmax(x, dim=-1),
    "of torch.special": lambda x: torch.special.log_softmax(x, -1),
}


@pytest.mark.parametrize("spelling", LAST.values(), ids=LAST)
def test_all_spellings_become_one_overload(spelling: Callable[[Tensor], Tensor]) -> None:
    gm = dynamo_graph(spelling, torch.ones(2, 3))
    (node,) = (node for node in gm.graph.nodes if name_of(node) in ("log_softmax", "special_log_softmax"))
    (op,) = (each.target for each in trace(node).graph.nodes if each.op == "call_function")
    assert str(op) in ("aten.log_softmax.int", "aten.special_log_softmax.default")


def test_tracing_edits_nothing_and_leaves_the_modes_as_they_are() -> None:
    gm = dynamo_graph(lambda x: x.exp(), torch.ones(3, requires_grad=True))
    before = [node.name for node in gm.graph.nodes]
    with torch.autocast("cpu", torch.bfloat16):
        trace(node_called(gm, "exp"))
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert [node.name for node in gm.graph.nodes] == before


def pieces(x: Tensor) -> list[Tensor]:
    return [torch.clamp(piece, 0, 1) for piece in x.chunk(4)]


def test_the_pieces_of_a_loop_share_a_trace() -> None:
    gm = dynamo_graph(pieces, torch.ones(8, 3))
    traces = Traces()
    assert len({id(traces(node_called(gm, "clamp", nth))) for nth in range(4)}) == 1


def test_other_constants_sizes_and_dtypes_are_other_traces() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.clamp(x, 0, 1), torch.clamp(x, 0, 2), torch.clamp(y, 0, 1), torch.clamp(x.double(), 0, 1)

    gm = dynamo_graph(program, torch.ones(8), torch.ones(9))
    keys = {trace_key(node_called(gm, "clamp", nth)) for nth in range(4)}
    assert len(keys) == 4
    assert None not in keys


def test_true_and_one_are_not_one_constant() -> None:
    gm = dynamo_graph(lambda x: (torch.add(x, True), torch.add(x, 1)), torch.ones(2, 3))
    assert trace_key(node_called(gm, "add")) != trace_key(node_called(gm, "add", 1))


def test_a_symbolic_size_is_traced_anew() -> None:
    gm = dynamo_graph(lambda x: x.exp(), torch.ones(7), dynamic=True)
    assert trace_key(node_called(gm, "exp")) is None

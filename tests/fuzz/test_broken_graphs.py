"""No graph makes the pass raise: real Dynamo graphs are damaged at random and given to it.

Whatever it makes of them, it gives a graph back, and after an error that graph is the one it was given.
"""

from __future__ import annotations

import operator
import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusedhead.backend import run_pass
from fusedhead.options import Options
from tests.fuzz.grammar import draw
from tests.fuzz.program import make_inputs, program

GRAPHS = int(os.environ.get("FUSEDHEAD_BROKEN_GRAPHS", "10"))
DAMAGES_A_GRAPH = 4


def dynamo_graphs(seed: str) -> list[GraphModule]:
    """The graphs that Dynamo makes of a random program."""
    case, result = draw(seed), []

    def keep(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        result.append(gm)
        return gm.forward

    torch.compiler.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(program(case), backend=keep, dynamic=case.dynamic or None)(*make_inputs(case, case.sizes))
    except Exception:  # programs that eager code refuses are as good, up to where they are refused
        return result
    return result


def calls(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op.startswith("call_")]


def forget_a_value(gm: GraphModule, rng: random.Random) -> None:
    rng.choice(list(gm.graph.nodes)).meta.pop("example_value", None)


def another_value(gm: GraphModule, rng: random.Random) -> None:
    values = [n.meta["example_value"] for n in gm.graph.nodes if "example_value" in n.meta]
    rng.choice(list(gm.graph.nodes)).meta["example_value"] = rng.choice([*values, None, 3, "text", (), [values[0]]])


def another_target(gm: GraphModule, rng: random.Random) -> None:
    node = rng.choice(calls(gm))
    node.op, node.target = "call_function", rng.choice(
        [torch.nn.functional.linear, torch.nn.functional.cross_entropy, torch.matmul, operator.getitem, torch.logsumexp,
         operator.imul, torch.gather, torch.softmax, torch.einsum, operator.setitem, torch.sum, torch.Tensor.view, len]
    )  # fmt: skip


def another_argument(gm: GraphModule, rng: random.Random) -> None:
    node = rng.choice(calls(gm))
    earlier = []
    for n in gm.graph.nodes:
        if n is node:
            break
        earlier.append(n)
    arguments = list(node.args)
    if arguments:
        arguments[rng.randrange(len(arguments))] = rng.choice([*earlier, None, -1, 2.5, "mean", slice(None), (0, 1)])
        node.args = tuple(arguments)


def fewer_arguments(gm: GraphModule, rng: random.Random) -> None:
    node = rng.choice(calls(gm))
    node.args = node.args[: rng.randrange(len(node.args) + 1)]


def unknown_keyword(gm: GraphModule, rng: random.Random) -> None:
    node = rng.choice(calls(gm))
    node.kwargs = {
        **node.kwargs,
        rng.choice(["dim", "reduction", "weight", "out", "inplace"]): rng.choice([0, None, "mean", True]),
    }


def no_stack_trace(gm: GraphModule, rng: random.Random) -> None:
    for node in gm.graph.nodes:
        node.meta["stack_trace"] = rng.choice(["", "File", 'File "a.py", line x', "no file"])


DAMAGES = [
    forget_a_value, another_value, another_target, another_argument, fewer_arguments, unknown_keyword, no_stack_trace,
]  # fmt: skip


def test_no_graph_makes_the_pass_raise() -> None:
    rng, tried = random.Random(0), 0
    for n in range(GRAPHS):
        for gm in dynamo_graphs(f"broken:{n}"):
            if not calls(gm):
                continue
            for _ in range(DAMAGES_A_GRAPH):
                rng.choice(DAMAGES)(gm, rng)
                before = str(gm.graph)
                result, report, _ = run_pass(gm, Options(logits="eager"))
                assert isinstance(result, GraphModule)
                assert str(gm.graph) == before, "the graph that was given has been edited"
                assert result is gm or not report.errors
                tried += 1
    assert tried > GRAPHS

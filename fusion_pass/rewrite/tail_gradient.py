"""The gradient of a tail as a graph, and the proof that the tail is linear.

No rule per op is needed: ``make_fx`` traces the gradient of the tail, and the tail is linear exactly when the trace
does not read the statistics. The trace then computes the coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from fusedhead.analysis.reasons import NotInForward
from fusedhead.compat import maybe_get_fake_mode
from fusedhead.graph.motion import random
from fusedhead.graph.nodes import callee, fake, name_of
from fusedhead.graph.reasons import Refusal, refuse


def coefficients(
    statistics: Sequence[Node],
    squares: Sequence[Node],
    tail: Sequence[Node],
    outside: Sequence[Node],
    transparent: Mapping[Node, Node],
) -> GraphModule | Refusal:
    """∂ scalar / ∂ (statistics, squares) as a graph of ``outside`` alone; a refusal if the tail is not linear.

    ``transparent``: nodes of the tail whose gradient equals that of another node.
    """
    free = [*statistics, *squares]

    def gradient(*values: Any) -> list[Tensor]:
        env = dict(zip([*free, *outside], values))
        for node in free:
            env[node] = env[node].detach().requires_grad_()
        leaves = [env[node] for node in free]
        with torch.enable_grad():
            for node in tail:
                if node in transparent:
                    env[node] = env[transparent[node]]
                elif node not in env:
                    args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                    env[node] = callee(node)(*args, **kwargs)
            total = env[tail[-1]]
            one = torch.ones(total.shape, dtype=total.dtype, device=total.device)
            grads = torch.autograd.grad(total, leaves, one, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves)]

    values = [fake(node) for node in [*free, *outside]]
    values = [v.detach() if isinstance(v, Tensor) else v for v in values]
    mode = maybe_get_fake_mode(fake(statistics[0]))
    with torch.autocast(fake(statistics[0]).device.type, enabled=False), mode or nullcontext():
        try:
            program = make_fx(gradient)(*values)
        except Exception as error:
            return refuse(NotInForward.NOT_DIFFERENTIABLE, kind=type(error).__name__)
    program.graph.eliminate_dead_code()
    reads = dependent(program.graph, len(free))
    for node in needed(program.graph, reads):
        if node in reads:
            return refuse(NotInForward.NOT_LINEAR, name=name_of(node))
        if random(node):
            return refuse(NotInForward.RANDOM, name=name_of(node))
    return program


def dependent(graph: Graph, statistics: int) -> set[Node]:
    """The nodes whose numbers, and not only shapes, depend on the first ``statistics`` placeholders."""
    reached = set([n for n in graph.nodes if n.op == "placeholder"][:statistics])
    for node in graph.nodes:
        if not shape_only(node) and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def needed(graph: Graph, reads: set[Node]) -> list[Node]:
    """The calls that the graph's outputs depend on, in order. The shape of a statistic is no dependency on it."""
    stack, calls = list(graph.output_node().all_input_nodes), set()
    while stack:
        node = stack.pop()
        if node in calls:
            continue
        calls.add(node)
        stack.extend(s for s in node.all_input_nodes if not (shape_only(node) and s in reads))
    return [node for node in graph.nodes if node in calls and (node.op == "call_function" or node in reads)]


SHAPE_ONLY = frozenset({"sym_size", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_empty", "new_ones"})


def shape_only(node: Node) -> bool:
    """Whether a use of a tensor reads its shape and not its numbers."""
    return name_of(node) in SHAPE_ONLY

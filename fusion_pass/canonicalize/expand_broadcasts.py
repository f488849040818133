"""Replaces calls that read only the shape of a tensor by calls that do not read it, where that shape is known.

``broadcast_tensors`` becomes one ``expand`` for each result: `torch.distributions.Categorical` reads its labels'
log-probabilities through one call that broadcasts both. ``y.expand_as(top)`` becomes ``y.expand(...)``: accuracy code
uses it to compare labels with top-k predictions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fusedhead.analysis.body import Body
from fusedhead.graph.edit import replace_node
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.sizes import same_shape, static


def run(body: Body) -> None:
    """Replace the results of every ``broadcast_tensors`` and ``expand_as`` by an ``expand`` of the operand."""
    graph = body.graph
    for node in graph.find_nodes(op="call_function", target=torch.functional.broadcast_tensors):
        for user in list(node.users):
            if name_of(user) == "getitem":
                expand_instead(graph, user, node.args[user.args[1]])  # type: ignore[index]
        if not node.users:
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_method", target="expand_as"):
        expand_instead(graph, node, node.args[0])


def expand_instead(graph: Graph, node: Node, operand: Any) -> None:
    """Replace ``node`` by ``operand``, expanded where the shapes differ. The node stays where a shape is not known."""
    sizes = expansion(operand, node) if isinstance(operand, Node) else None
    if sizes is None:
        return
    if any(size != -1 for size in sizes) or any(user.op == "output" for user in node.users):  # a fresh tensor
        with graph.inserting_before(node):
            operand = graph.call_method("expand", (operand, sizes))
        operand.meta = dict(node.meta)
    replace_node(node, operand)


def expansion(operand: Node, result: Node) -> list[int] | None:
    """The sizes that `Tensor.expand` takes the operand to the result with, -1 where a size stays; None if not known."""
    old, target = list(fake(operand).shape), list(fake(result).shape)
    new = len(target) - len(old)  # the operand lacks these: no -1
    sizes = [-1 if d >= new and same_shape([old[d - new]], [size]) else static(size) for d, size in enumerate(target)]
    return None if None in sizes else sizes  # type: ignore[return-value]

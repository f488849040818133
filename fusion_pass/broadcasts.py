"""``broadcast_tensors`` taken apart: each result by itself, and a tensor that has the shape already as it is.

`torch.distributions.Categorical` reads its labels' log-probabilities through one call that broadcasts both. This file
knows no heads.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from fusedhead.emit import static
from fusedhead.read import fake, name_of
from fusedhead.rules.losses import same_shape


def separate(graph: Graph) -> None:
    """Replace the results of every ``broadcast_tensors`` by their operands, expanded where that has to be, in place."""
    for node in graph.find_nodes(op="call_function", target=torch.functional.broadcast_tensors):
        for user in list(node.users):
            operand = node.args[user.args[1]] if name_of(user) == "getitem" else None  # type: ignore[index]
            if not isinstance(operand, Node):
                continue
            sizes = expansion(operand, user)
            if sizes is None:
                continue
            if any(size != -1 for size in sizes):
                with graph.inserting_before(user):
                    operand = graph.call_method("expand", (operand, sizes))
                operand.meta = dict(user.meta)
            user.replace_all_uses_with(operand)
            graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)


def expansion(operand: Node, result: Node) -> list[int] | None:
    """What `Tensor.expand` makes the result of the operand with, -1 where a size stays; None if that is not known."""
    own, to = list(fake(operand).shape), list(fake(result).shape)
    new = len(to) - len(own)  # dimensions that the operand lacks, which cannot be left to stay
    sizes = [-1 if d >= new and same_shape([own[d - new]], [size]) else static(size) for d, size in enumerate(to)]
    return None if None in sizes else sizes  # type: ignore[return-value]

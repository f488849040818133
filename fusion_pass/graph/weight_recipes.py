"""Weights that a graph computes from its inputs: sliced, scaled, cast, normalised, merged with an adapter.

Returned logits are computed outside of the graph, and such a weight is recomputed there with its gradients. To return
the weight too would cost a tensor [V, D] and the backward of its computation, even where nobody uses the logits.
Recomputing is exact where the nodes

* are pure: they write nothing, draw no random numbers, and nothing writes to their results,
* start at inputs of the graph,
* give the recorded dtypes and shapes when run without autocast (products with their operands cast),
* and are few, with small results, since they run for every answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fusedhead.compat import HigherOrderOperator, maybe_get_fake_mode, tree_leaves
from fusedhead.graph.aliases import storages
from fusedhead.graph.effects import draws, may_write, writes
from fusedhead.graph.nodes import callee, fake, hint, name_of
from fusedhead.graph.op_names import PROJECTIONS

MOST_NODES = 64
MOST_ENTRIES = 16  # elements of all results together, over the elements of the weight


def making(weights: Iterable[Node]) -> set[Node]:
    """The nodes that compute the recomputable ones of ``weights``."""
    return set().union(*(makers for makers in map(made_of_inputs, weights) if makers))


def made_of_inputs(weight: Node) -> set[Node] | None:
    """The nodes that compute a weight from the graph's inputs (none for an input); None if it cannot be recomputed."""
    makers: set[Node] = set()
    stack = [weight]
    while stack:
        node = stack.pop()
        if node.op == "placeholder" or node in makers:
            continue
        if not node.op.startswith("call_") or isinstance(node.target, HigherOrderOperator):
            return None
        makers.add(node)
        stack += node.all_input_nodes
        if len(makers) > MOST_NODES:
            return None
    if not makers:
        return makers
    entries = sum(map(entries_of, makers))
    if entries > MOST_ENTRIES * max(1, entries_of(weight)) or not all(map(same_again, makers)):
        return None
    return None if written_in_graph(makers) else makers


def entries_of(node: Node) -> int:
    return sum(hint(x.numel()) or 0 for x in tree_leaves(fake(node)) if isinstance(x, Tensor))


def written_in_graph(nodes: set[Node]) -> bool:
    """Whether anything in the graph writes to the results of the nodes."""
    written = set().union(*map(storages, nodes))
    inputs = {source for node in nodes for source in node.all_input_nodes if source.op == "placeholder"}
    written = written.difference(*map(storages, inputs))
    return any(may_write(node, written) for node in next(iter(nodes)).graph.nodes)


def same_again(node: Node) -> bool:
    """Whether a node run again without autocast gives the same tensors: it is pure, and the dtypes are equal."""
    if writes(node) or draws(node):
        return False
    recorded = tree_leaves(fake(node))
    mode = next(filter(None, map(maybe_get_fake_mode, (x for x in recorded if isinstance(x, Tensor)))), None)
    device = next((x.device.type for x in recorded if isinstance(x, Tensor)), "cpu")
    try:
        fakes = mode or nullcontext()
        with fakes, torch.no_grad(), torch.autocast(device, enabled=False):
            args, kwargs = map_arg((node.args, node.kwargs), lambda source: cast_operand(node, source))
            results = tree_leaves(callee(node)(*args, **kwargs))
    except Exception:
        return False
    return len(results) == len(recorded) and all(
        (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) if isinstance(b, Tensor) else True
        for a, b in zip(results, recorded)
    )


def cast_operand(node: Node, source: Node) -> Any:
    """The fake value of an operand, cast as autocast casts it for a product."""
    value = fake(source)
    return value.to(fake(node).dtype) if is_cast(node, source) else value


def is_cast(node: Node, source: Node) -> bool:
    """Whether autocast casts an operand of a product."""
    value, result = fake(source), fake(node)
    return (
        name_of(node) in PROJECTIONS
        and isinstance(value, Tensor)
        and isinstance(result, Tensor)
        and value.is_floating_point()
        and value.dtype != result.dtype
    )

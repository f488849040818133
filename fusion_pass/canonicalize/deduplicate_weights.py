"""Weights that a loop makes anew for every piece, ``F.linear(x, w.to(x.dtype))``, as one node that all pieces read.

Heads share a sweep, and one gradient of the weight, where they share the node. Nodes that make a weight of the graph's
inputs (`weights`) by the same calls give the same numbers where nothing is written to in between, no mode is another,
and none of them leaves the graph: a second name of its memory would be seen. This file knows no heads.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch.fx import Graph, Node

from fusedhead.compat import tree_flatten
from fusedhead.graph.aliases import storage
from fusedhead.graph.effects import may_write
from fusedhead.graph.modes import autocasts, grad_modes
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.weight_recipes import made_of_inputs
from fusedhead.rules.projections import SPELLINGS

WEIGHT_AT = {"linear": 1, "matmul": 1, "mm": 1, "addmm": 2}  # the place of a product's second factor


def join(graph: Graph) -> None:
    """Let products read the first of the nodes that make the same weight, in place."""
    made = [source for node in graph.nodes if name_of(node) in SPELLINGS for source in weights_at(node)]
    made = [node for node in dict.fromkeys(made) if node.op.startswith("call_") and may_repeat(node)]
    if len(made) < 2:
        return
    chains = {node: found for node in made if (found := made_of_inputs(node))}
    inside = set().union(*chains.values()) if len(chains) > 1 else set()
    modes, regions = grad_modes(graph), autocasts(graph)
    first: dict[Hashable, Node] = {}
    for node in list(graph.nodes):
        if node not in inside or any(user.op == "output" for user in node.users):
            continue
        key = call_of(node)
        if key is None:
            continue
        known = first.setdefault((key, modes[node], regions[node]), node)
        if known is not node and not changed(known, node):
            node.replace_all_uses_with(known)
            graph.erase_node(node)


def weights_at(product: Node) -> list[Node]:
    """The operands of a product that may be a weight: not the hidden states, where their place is known."""
    at = WEIGHT_AT.get(name_of(product))
    if at is None:
        return product.all_input_nodes
    return [node for node in product.args[at : at + 1] if isinstance(node, Node)]


def may_repeat(node: Node) -> bool:
    """Whether a node reads something that another node like it reads too."""
    return any(
        user is not node and user.target == node.target for source in node.all_input_nodes for user in source.users
    ) or any(may_repeat(source) for source in node.all_input_nodes if source.op.startswith("call_"))


def call_of(node: Node) -> Hashable:
    """What a node calls with which arguments, None where that cannot be told."""
    leaves, spec = tree_flatten((node.args, node.kwargs))
    key = node.op, node.target, str(spec), tuple((type(leaf), leaf) for leaf in leaves)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def changed(begin: Node, end: Node) -> bool:
    """Whether what a node reads is written to between it and another."""
    memory = {at for at in (storage(fake(source)) for source in begin.all_input_nodes) if at is not None}
    node = begin.next
    while node is not end:
        if may_write(node, memory):
            return True
        node = node.next
    return may_write(begin, memory)

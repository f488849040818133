"""Common subexpressions of weights: ``F.linear(x, w.to(x.dtype))`` in a loop casts once, and all pieces read one node.

Heads that share the node share a sweep and one gradient of the weight. Nodes that compute a weight from the graph's
inputs (`weight_recipes`) by the same calls are merged where nothing is written in between, their modes are equal, and
none of them is returned: the caller would see two names of one memory.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch.fx import Node

from fusedhead.analysis.body import Body
from fusedhead.compat import tree_flatten
from fusedhead.graph.aliases import storage
from fusedhead.graph.edit import replace_node
from fusedhead.graph.effects import may_write
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.op_names import PROJECTIONS
from fusedhead.graph.weight_recipes import made_of_inputs

WEIGHT_AT = {"linear": 1, "matmul": 1, "mm": 1, "addmm": 2}  # the position of a product's second factor


def run(body: Body) -> None:
    """Let products read the first of the nodes that compute the same weight."""
    graph, facts = body.graph, body.facts
    weights = [source for node in facts.named(PROJECTIONS) for source in weights_at(node)]
    weights = [node for node in dict.fromkeys(weights) if node.op.startswith("call_") and may_repeat(node)]
    if len(weights) < 2:
        return
    chains = {node: makers for node in weights if (makers := made_of_inputs(node))}
    inside = set().union(*chains.values()) if len(chains) > 1 else set()
    first: dict[Hashable, Node] = {}
    for node in list(graph.nodes):
        if node not in inside or any(user.op == "output" for user in node.users):
            continue
        key = call_of(node)
        if key is None:
            continue
        earlier = first.setdefault((key, facts.grad_mode(node), facts.autocast(node)), node)
        if earlier is not node and not is_written_between(earlier, node):
            replace_node(node, earlier)


def weights_at(product: Node) -> list[Node]:
    """The operands of a product that may be a weight: not the hidden states where their position is known."""
    at = WEIGHT_AT.get(name_of(product))
    if at is None:
        return product.all_input_nodes
    return [node for node in product.args[at : at + 1] if isinstance(node, Node)]


def may_repeat(node: Node) -> bool:
    """Whether another node of the same kind reads an operand of a node."""
    return any(
        user is not node and user.target == node.target for source in node.all_input_nodes for user in source.users
    ) or any(may_repeat(source) for source in node.all_input_nodes if source.op.startswith("call_"))


def call_of(node: Node) -> Hashable:
    """A key of a node's target and arguments; None where they cannot be compared."""
    leaves, spec = tree_flatten((node.args, node.kwargs))
    key = node.op, node.target, str(spec), tuple((type(leaf), leaf) for leaf in leaves)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def is_written_between(begin: Node, end: Node) -> bool:
    """Whether an operand of a node is written between it and another node."""
    memory = {at for at in (storage(fake(source)) for source in begin.all_input_nodes) if at is not None}
    node = begin.next
    while node is not end:
        if may_write(node, memory):
            return True
        node = node.next
    return may_write(begin, memory)

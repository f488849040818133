"""Logits that losses read both ways, along the classes and along the tokens: ``CE(z, y) + CE(z.t(), y)`` of CLIP.

zᵀ is a head too, with hidden states and weight in each other's place: (h wᵀ)ᵀ = w hᵀ. Here every transposed reading
gets a product of its own, with the scales and casts that z has on the way:

    z = scale * (h @ w.t());  CE(z.t(), y)     ->     CE(scale * (w @ h.t()), y)

That pays only where no logits are left to be built, which `left` tells when the graph has been fused. This file edits
the graph and decides no head.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fusedhead.analysis.projections import ANCHORS
from fusedhead.graph.modes import autocasts, grad_modes
from fusedhead.graph.nodes import fake, name_of
from fusedhead.ir.builder import Emit, aten
from fusedhead.legality.checks import Mutations
from fusedhead.rules.table import Family

FAMILY = Family(
    "losses in both directions",
    "one loss along the classes and one along the other dimension of the same product (CLIP), as two heads",
    "",
)
TRANSPOSES = frozenset({"t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute"})
PRODUCTS = frozenset({"matmul", "mm", "linear"})
# element by element, of one matrix and numbers: the same before and after a transpose
SCALES = frozenset({"mul", "multiply", "truediv", "div", "divide", "add", "sub", "neg", "float", "to", "contiguous"})


def separate(graph: Graph) -> list[Node]:
    """Give transposed readings of logits products of their own, in place. Returns the products, old and new."""
    readings = [node for node in graph.nodes if transposes(node) and reaches_a_loss(node)]
    if not readings:
        return []
    recorded, regions, mutations = grad_modes(graph), autocasts(graph), Mutations(graph)
    doubled = []
    for node in readings:
        chain = way_to(node)
        if not chain:
            continue
        same = all(recorded[n] == recorded[node] and regions[n] == regions[node] for n in chain)
        met = [node, *chain, *(s for c in chain for s in c.all_input_nodes)]
        if same and mutations.anywhere_after(chain[0], [n for n in met if isinstance(fake(n), Tensor)]) is None:
            doubled += [chain[0], turned(graph, node, chain, recorded[node])]
    return doubled


def left(products: Iterable[Node]) -> bool:
    """Whether any of ``products`` is still computed."""
    return any(not node._erased and node.users for node in products)


def is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


def transposes(node: Node) -> bool:
    """Whether a node swaps the two dimensions of a matrix."""
    if not node.op.startswith("call_") or len(node.all_input_nodes) != 1:
        return False
    if name_of(node) not in TRANSPOSES or not is_matrix(fake(node)) or not is_matrix(fake(node.all_input_nodes[0])):
        return False
    given: Any = () if name_of(node) in ("T", "mT") else node.args[1:]
    dims = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    if node.kwargs or any(type(d) is not int for d in dims):
        return False
    if name_of(node) == "permute":
        return [d % 2 for d in dims] == [1, 0]
    return not dims or sorted(d % 2 for d in dims) == [0, 1]


def scales(node: Node) -> bool:
    """Whether a node works element by element on one matrix."""
    if not node.op.startswith("call_") or name_of(node) not in SCALES or not is_matrix(fake(node)):
        return False
    others = [n for n in node.all_input_nodes if n is not matrix_of(node)]
    return matrix_of(node) is not None and all(not isinstance(fake(n), Tensor) or not fake(n).ndim for n in others)


def matrix_of(node: Node) -> Node | None:
    """The one matrix among the inputs of a node."""
    found = [n for n in node.all_input_nodes if isinstance(fake(n), Tensor) and fake(n).ndim]
    return found[0] if len(found) == 1 and fake(found[0]).shape == fake(node).shape else None


def reaches_a_loss(node: Node) -> bool:
    """Whether an anchor reads a node, with nothing but scales and casts in between."""
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user.op.startswith("call_") and name_of(user) in ANCHORS:
                return True
            if scales(user):
                stack.append(user)
    return False


def way_to(node: Node) -> list[Node]:
    """The product that a transpose reads and what happens to it on the way, or nothing."""
    chain: list[Node] = []
    source = node.all_input_nodes[0]
    while scales(source):
        chain.append(source)
        above = matrix_of(source)
        assert above is not None
        source = above
    whole = source.op.startswith("call_") and name_of(source) in PRODUCTS and len(source.all_input_nodes) == 2
    if not whole or source.kwargs or not all(is_matrix(fake(n)) for n in (source, *source.all_input_nodes)):
        return []
    return [source, *reversed(chain)]


def turned(graph: Graph, node: Node, chain: list[Node], grad: bool) -> Node:
    """Put the transposed product, with what happens on the way, in the place of ``node``; returns the product."""
    product = chain[0]
    first, second = product.args
    emit = Emit(graph)
    with emit.before(node, product, grad=grad):
        by_class = second if name_of(product) == "linear" else emit(aten.t.default, second)
        by_token = emit(aten.t.default, first)
    made: dict[Node, Node] = {}
    with graph.inserting_before(node):
        made[product] = graph.call_function(aten.mm.default, (by_class, by_token))
        for step in chain[1:]:
            args, kwargs = map_arg((step.args, step.kwargs), lambda n: made.get(n, n))
            made[step] = graph.create_node(step.op, step.target, args, kwargs)
    with emit.mode or nullcontext(), torch.set_grad_enabled(grad):
        for step, copy in made.items():  # what autocast did to a value it does to its transpose
            copy.meta = {**step.meta, "example_value": fake(step).t().contiguous()}
    node.replace_all_uses_with(made[chain[-1]])
    graph.erase_node(node)
    return made[product]

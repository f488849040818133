"""Contrastive losses (CLIP): one logits matrix is used row-wise and, transposed, column-wise. Each use gets a product.

zᵀ is a head too, with hidden states and weight swapped: (h wᵀ)ᵀ = w hᵀ. Its product gets the scales and casts of z:

    z = scale * (h @ w.t());  CE(z.t(), y)     ->     CE(scale * (w @ h.t()), y)

The pass is speculative: it pays only where no logits are built once the graph has been fused.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fusedhead.analysis.body import Body
from fusedhead.graph.edit import replace_node
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.op_names import HEAD_ENDS, SCALES, TRANSPOSES, is_call_of
from fusedhead.ir.builder import Emit, aten

PRODUCTS = frozenset({"matmul", "mm", "linear"})
# Elementwise ops of one matrix and numbers: they commute with a transpose.
TRANSPOSE_INVARIANT = SCALES | {"float", "to", "contiguous"}


def run(body: Body) -> None:
    """Give each transposed use of logits a product of its own."""
    transposed = [node for node in body.graph.nodes if transposes(node) and reaches_a_loss(node)]
    facts = body.facts
    for node in transposed:
        chain = product_and_scales(node)
        if not chain:
            continue
        modes = {(facts.grad_mode(n), facts.autocast(n)) for n in (node, *chain)}
        tensors = [node, *chain, *(source for step in chain for source in step.all_input_nodes)]
        tensors = [n for n in tensors if isinstance(fake(n), Tensor)]
        if len(modes) == 1 and facts.write_after(chain[0], tensors) is None:
            product = transposed_product(body.graph, node, chain, facts.grad_mode(node))
            body.speculated += [chain[0], product]
            facts.refresh()


def is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


def transposes(node: Node) -> bool:
    """Whether a node swaps the two dimensions of a matrix."""
    if not node.op.startswith("call_") or len(node.all_input_nodes) != 1:
        return False
    if name_of(node) not in TRANSPOSES or not is_matrix(fake(node)) or not is_matrix(fake(node.all_input_nodes[0])):
        return False
    args: Any = () if name_of(node) in ("T", "mT") else node.args[1:]
    dims = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
    if node.kwargs or any(type(d) is not int for d in dims):
        return False
    if name_of(node) == "permute":
        return [d % 2 for d in dims] == [1, 0]
    return not dims or sorted(d % 2 for d in dims) == [0, 1]


def scales(node: Node) -> bool:
    """Whether a node is an elementwise op on one matrix."""
    if not node.op.startswith("call_") or name_of(node) not in TRANSPOSE_INVARIANT or not is_matrix(fake(node)):
        return False
    numbers = [n for n in node.all_input_nodes if n is not matrix_of(node)]
    return matrix_of(node) is not None and all(not isinstance(fake(n), Tensor) or not fake(n).ndim for n in numbers)


def matrix_of(node: Node) -> Node | None:
    """The one matrix among the inputs of a node."""
    matrices = [n for n in node.all_input_nodes if isinstance(fake(n), Tensor) and fake(n).ndim]
    return matrices[0] if len(matrices) == 1 and fake(matrices[0]).shape == fake(node).shape else None


def reaches_a_loss(node: Node) -> bool:
    """Whether a loss reads a node, with nothing but scales and casts in between."""
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if is_call_of(user, HEAD_ENDS):
                return True
            if scales(user):
                stack.append(user)
    return False


def product_and_scales(node: Node) -> list[Node]:
    """The product that a transpose reads and the steps between them, in order; empty where it reads no product."""
    chain: list[Node] = []
    source = node.all_input_nodes[0]
    while scales(source):
        chain.append(source)
        above = matrix_of(source)
        assert above is not None
        source = above
    is_product = is_call_of(source, PRODUCTS) and len(source.all_input_nodes) == 2
    if not is_product or source.kwargs or not all(is_matrix(fake(n)) for n in (source, *source.all_input_nodes)):
        return []
    return [source, *reversed(chain)]


def transposed_product(graph: Graph, node: Node, chain: list[Node], grad: bool) -> Node:
    """Replace ``node`` by the transposed product with the steps of ``chain``; returns the product."""
    product = chain[0]
    first, second = product.args
    emit = Emit(graph)
    with emit.before(node, product, grad=grad):
        by_class = second if name_of(product) == "linear" else emit(aten.t.default, second)
        by_token = emit(aten.t.default, first)
    copies: dict[Node, Node] = {}
    with graph.inserting_before(node):
        copies[product] = graph.call_function(aten.mm.default, (by_class, by_token))
        for step in chain[1:]:
            args, kwargs = map_arg((step.args, step.kwargs), lambda n: copies.get(n, n))
            copies[step] = graph.create_node(step.op, step.target, args, kwargs)
    with emit.mode or nullcontext(), torch.set_grad_enabled(grad):
        for step, copy in copies.items():  # autocast gives a value and its transpose the same dtype
            copy.meta = {**step.meta, "example_value": fake(step).t().contiguous()}
    replace_node(node, copies[chain[-1]])
    return copies[product]

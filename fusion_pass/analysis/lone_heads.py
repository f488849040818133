"""Heads without a loss in the graph: projections whose logits the graph returns, large enough to be deferred.

The sizes of a projection tell it from an inner layer of a network. `legality` decides whether its logits can be
deferred.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.fx import Graph, Node

from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.op_names import PROJECTIONS

LEAST_VOCAB = 1024
LEAST_RATIO = 8  # V / D below this may be an inner layer of a network ...
SURE_VOCAB = 30_000  # ... except from here on


def looks_like_a_head(node: Node) -> bool:
    """Whether a projection without a loss has the sizes of a head, so that deferring its logits pays."""
    hidden, result = next((fake(n) for n in node.all_input_nodes), None), fake(node)
    if not isinstance(hidden, Tensor) or not isinstance(result, Tensor) or hidden.ndim < 2:
        return False
    depth, vocab = hidden.shape[-1], result.shape[-1]
    return isinstance(depth, int) and isinstance(vocab, int) and has_sizes_of_a_head(vocab, depth)


def has_sizes_of_a_head(vocab: int, depth: int) -> bool:
    """Whether a weight [V, D] has the sizes of a head and not of an inner layer."""
    return vocab >= LEAST_VOCAB and (vocab >= LEAST_RATIO * depth or vocab >= SURE_VOCAB)


def last_products(graph: Graph, passes: Callable[[Node], bool] = lambda node: True) -> list[Node]:
    """The products that reach an output of the graph through no other product, and only through nodes that ``passes``
    accepts.
    """
    products: list[Node] = []
    seen: set[Node] = set()
    stack = [graph.output_node()]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in seen or not source.op.startswith("call_"):
                continue
            seen.add(source)
            if name_of(source) in PROJECTIONS:
                products.append(source)
            elif passes(source):
                stack.append(source)
    return products


def heads_without_loss(graph: Graph) -> set[Node]:
    """Projections that reach an output of the graph through no other projection."""
    return set(filter(looks_like_a_head, last_products(graph)))

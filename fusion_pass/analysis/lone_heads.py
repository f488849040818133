"""Heads that have no loss in the graph: projections whose logits it returns, and which are worth deferring.

A projection is told from an inner layer of a network by its sizes. This file must not know what deferring is, and
decides about no site: whether a head can be deferred is asked later.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.fx import Graph, Node

from fusedhead.graph.nodes import fake, name_of
from fusedhead.rules.projections import SPELLINGS

LEAST_VOCAB = 1024
LEAST_RATIO = 8  # V / D below this may be an inner layer of a network ...
SURE_VOCAB = 30_000  # ... except from here on


def looks_like_a_head(node: Node) -> bool:
    """Whether a projection, by its sizes, is worth deferring although the graph has no loss on it."""
    hidden, result = next((fake(n) for n in node.all_input_nodes), None), fake(node)
    if not isinstance(hidden, Tensor) or not isinstance(result, Tensor) or hidden.ndim < 2:
        return False
    depth, vocab = hidden.shape[-1], result.shape[-1]
    return isinstance(depth, int) and isinstance(vocab, int) and pays(vocab, depth)


def pays(vocab: int, depth: int) -> bool:
    """Whether a weight [V, D] is that of a head, by its sizes, and not of an inner layer."""
    return vocab >= LEAST_VOCAB and (vocab >= LEAST_RATIO * depth or vocab >= SURE_VOCAB)


def last_products(graph: Graph, passed: Callable[[Node], bool] = lambda node: True) -> list[Node]:
    """The products from which an output of the graph is reached past no other and past ``passed`` nodes."""
    found: list[Node] = []
    seen: set[Node] = set()
    stack = [graph.output_node()]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in seen or not source.op.startswith("call_"):
                continue
            seen.add(source)
            if name_of(source) in SPELLINGS:
                found.append(source)
            elif passed(source):
                stack.append(source)
    return found


def heads_without_loss(graph: Graph) -> set[Node]:
    """Projections from which an output of the graph is reached without passing another one."""
    return set(filter(looks_like_a_head, last_products(graph)))

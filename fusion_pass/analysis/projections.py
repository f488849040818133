"""Where heads are looked for: the ops that end one, and what lies between them and the products above.

By names and edges alone: this file reads no node, and must not know what a head is.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Graph, Node

from fusedhead.graph.nodes import name_of
from fusedhead.rules.projections import SPELLINGS

# Names of the ops that can end a head; only projections that reach one of them are looked at.
ANCHORS = frozenset(
    {
        "cross_entropy",
        "cross_entropy_loss",
        "nll_loss",
        "nll_loss_nd",
        "log_softmax",
        "_log_softmax",
        "logsumexp",
        "kl_div",
    }
)


def above_losses(graph: Graph, products: Collection[str] = SPELLINGS) -> list[Node]:
    """The nodes that anchors are computed from, up to the first product on every way, the nearest first."""
    found: dict[Node, None] = {}
    stack = [node for node in graph.nodes if node.op.startswith("call_") and name_of(node) in ANCHORS]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found and source.op.startswith("call_"):
                found[source] = None
                if name_of(source) not in products:
                    stack.append(source)
    return list(found)


def candidates(graph: Graph) -> set[Node]:
    """The projections from which an anchor is reached without passing another projection."""
    return {node for node in above_losses(graph) if name_of(node) in SPELLINGS}

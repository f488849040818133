"""Checkpoints that hold a head alone, and the loss outside: the head's nodes in the place of the checkpoint.

A checkpoint keeps its operands and computes the rest again. So does a fused head, and it never has the logits, which
the checkpoint was to save and returns all the same. Where the head is then not fused, the caller takes the graph as it
was: this file opens, and knows no rule that would say.
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from fusedhead.analysis.projections import above_losses
from fusedhead.canonicalize.inline_regions import region_of, replaced
from fusedhead.compat import HigherOrderOperator
from fusedhead.graph.effects import draws, writes
from fusedhead.graph.nodes import name_of
from fusedhead.rewrite.statistics import PURE_VIEWS
from fusedhead.rules.projections import SPELLINGS

CHECKPOINTS = frozenset({"tag_activation_checkpoint", "wrap_activation_checkpoint"})
CHOSEN = "context_fn"  # of a checkpoint that chooses what is kept
BEFORE = PURE_VIEWS | {"bfloat16", "half", "contiguous"}  # what may be done to hidden states and weight first


def open_heads(gm: GraphModule) -> list[Node]:
    """Open the checkpoints between a loss of the graph and its heads that hold a head alone, in place.

    Returns the products that are now the graph's own.
    """
    calls = [n for n in gm.graph.nodes if name_of(n) in CHECKPOINTS and n.op == "call_function"]
    if not calls:
        return []
    reached = above_losses(gm.graph, SPELLINGS | CHECKPOINTS)
    found: list[Node] = []
    for call in calls:
        if call in reached and CHOSEN not in call.kwargs and a_head_alone(region_of(call).graph):
            known = set(gm.graph.nodes)
            if replaced(gm, call):
                found += [n for n in gm.graph.nodes if n not in known and name_of(n) in SPELLINGS]
    return found


def a_head_alone(graph: Graph) -> bool:
    """Whether a region is a product of its operands and what is made of that, with nothing else to compute again."""
    made: set[Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if not node.op.startswith("call_") or isinstance(node.target, HigherOrderOperator):
            return False
        of_product = any(source in made for source in node.all_input_nodes)
        if writes(node) or draws(node) or (name_of(node) in SPELLINGS and of_product):
            return False
        if of_product or name_of(node) in SPELLINGS:
            made.add(node)
        elif name_of(node) not in BEFORE:
            return False
    return any(result in made for result in graph.output_node().all_input_nodes)

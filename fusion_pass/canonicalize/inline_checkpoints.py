"""Checkpoints that hold a head alone, with the loss outside, become the head's own nodes.

A fused head recomputes as well and never stores the logits, so that a checkpoint around it saves nothing. The pass is
speculative: where the head is not fused afterwards, the driver starts again without it.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.projections import above_losses
from fusedhead.canonicalize.inline_regions import inline_call, region_of
from fusedhead.compat import HigherOrderOperator
from fusedhead.graph.effects import draws, writes
from fusedhead.graph.nodes import name_of
from fusedhead.graph.op_names import CASTS, CHECKPOINTS, PROJECTIONS, REMADE_FREELY

SELECTIVE = "context_fn"  # the argument of a checkpoint that chooses the tensors to keep
OPERAND_OPS = REMADE_FREELY | CASTS | {"contiguous"}  # ops on hidden states and weight that a head may begin with


def run(body: Body) -> None:
    """Inline each checkpoint that holds a head alone and lies between the head and a loss of the graph."""
    graph = body.graph
    calls = [node for node in body.facts.named(CHECKPOINTS) if node.op == "call_function"]
    if not calls:
        return
    reached = above_losses(body.facts, PROJECTIONS | CHECKPOINTS)
    for call in calls:
        if call in reached and SELECTIVE not in call.kwargs and holds_a_head_alone(region_of(call).graph):
            old_nodes = set(graph.nodes)
            if inline_call(body.module, call, body.records_gradients):
                body.speculated += [n for n in graph.nodes if n not in old_nodes and name_of(n) in PROJECTIONS]


def holds_a_head_alone(graph: Graph) -> bool:
    """Whether a region is a product of its operands and functions of it, so that nothing else is recomputed."""
    logits: set[Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if not node.op.startswith("call_") or isinstance(node.target, HigherOrderOperator):
            return False
        of_product = any(source in logits for source in node.all_input_nodes)
        if writes(node) or draws(node) or (name_of(node) in PROJECTIONS and of_product):
            return False
        if of_product or name_of(node) in PROJECTIONS:
            logits.add(node)
        elif name_of(node) not in OPERAND_OPS:
            return False
    return any(result in logits for result in graph.output_node().all_input_nodes)

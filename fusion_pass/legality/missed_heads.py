"""Reports projections under a loss that the interpreter never reached: in a transform or a region, or of another form.

A product that no rule reads (in float64, of two batches) is reported where a loss over classes reads its entries.
Without such a loss, as in attention or a router, it is no head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.projections import candidates
from fusedhead.compat import HigherOrderOperator
from fusedhead.graph.nodes import name_of
from fusedhead.graph.op_names import CASTS, CLASS_LOSSES, COPIES, PROJECTIONS, RESHAPES, SCALES, is_call_of
from fusedhead.graph.reasons import refuse
from fusedhead.legality.checks import functorch
from fusedhead.legality.reasons import Illegal

# Ops that keep logits logits or make them log-probabilities.
CARRIES_LOGITS = (
    RESHAPES | CASTS | COPIES | SCALES | {"transpose", "permute", "movedim", "squeeze", "unsqueeze", "t", "getitem"}
    | {"log_softmax"}
)  # fmt: skip


def run(body: Body) -> None:
    """Report every projection under a loss that the reading does not contain."""
    graph, reading = body.graph, body.reading
    read = {node for site in reading.sites for node in (site.head.node, *site.head.products)}
    missed = candidates(body.facts) - read
    transform = functorch(body.facts) if missed else None
    if transform is not None:
        reasons = dict.fromkeys(sorted(missed), transform)
    else:
        reasons = {}
        for node, region in loss_operands(graph):
            if region and name_of(node) in PROJECTIONS:
                reasons[node] = refuse(Illegal.LOSS_OUTSIDE_REGION, node=node, region=region).placed()
            elif node in reading.no_rule and node not in read:
                reasons[node] = reading.no_rule[node].placed()
    for node, reason in reasons.items():
        body.note(node, reason)


def loss_operands(graph: Graph) -> Iterator[tuple[Node, str]]:
    """The nodes that losses over classes read, up to the nodes that compute their numbers.

    Each comes with its region: the name of the higher-order op whose result the loss reads, or "".
    """
    for loss in graph.nodes:
        if loss.op == "call_function" and name_of(loss) in CLASS_LOSSES:
            node: Any = loss.args[0] if loss.args else loss.kwargs.get("input")
            region = ""
            while isinstance(node, Node):
                yield node, region
                if name_of(node) == "getitem" and is_region(node.args[0]):
                    node, region = result_inside(node), name_of(node.args[0])  # type: ignore[arg-type]
                elif is_call_of(node, CARRIES_LOGITS) and node.args:
                    node = node.args[0]
                else:
                    break


def is_region(node: object) -> bool:
    return isinstance(node, Node) and isinstance(node.target, HigherOrderOperator)


def result_inside(item: Node) -> object:
    """The node in a region's body that computes the result that ``item`` reads, or None."""
    region, number = item.args
    body = region.args[0] if isinstance(region, Node) and region.args else None
    module = getattr(item.graph.owning_module, str(body.target), None) if isinstance(body, Node) else None
    if not isinstance(module, GraphModule) or not isinstance(number, int):
        return None
    results = module.graph.output_node().args[0]
    return results[number] if isinstance(results, (list, tuple)) and number < len(results) else None

"""Records of heads that could not even be read: in a torch.func transform or a region, or products of another form.

A product that no rule reads (in float64, of two batches) is worth a record where its entries are what a loss over
classes is taken of; elsewhere, in attention or a router, it is no head. This file decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fusedhead.analysis.interpreter import Reading
from fusedhead.analysis.projections import candidates
from fusedhead.analysis.source_lines import module, place
from fusedhead.compat import HigherOrderOperator
from fusedhead.graph.nodes import fake, hint, name_of, where
from fusedhead.legality.checks import functorch
from fusedhead.report.report import HeadRecord
from fusedhead.rules.projections import SPELLINGS

LOSSES = frozenset({"cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd"})
# what leaves logits logits, or makes them log-probabilities, by the names of nodes
CARRYING = frozenset(
    {"view", "reshape", "flatten", "transpose", "permute", "movedim", "contiguous", "squeeze", "unsqueeze", "t",
     "float", "double", "to", "mul", "truediv", "div", "add", "sub", "log_softmax", "getitem", "clone"}
)  # fmt: skip


def unread(graph: Graph, reading: Reading) -> dict[Node, HeadRecord]:
    """One record a projection with a loss that the reading does not have."""
    read = {node for site in reading.sites for node in (site.head.node, *site.head.products)}
    missed = candidates(graph) - read
    transform = functorch(graph) if missed else None
    if transform is not None:
        reasons = dict.fromkeys(sorted(missed), transform)
    else:
        reasons = {}
        for node, region in taken(graph):
            if region and name_of(node) in SPELLINGS:
                reasons[node] = f"the head is inside {region}, and its loss outside (at {where(node)})"
            elif node in reading.unread and node not in read:
                reasons[node] = f"{reading.unread[node]} (at {where(node)})"
    return {node: record for node, reason in reasons.items() for record in unread_head(node, reason)}


def taken(graph: Graph) -> Iterator[tuple[Node, str]]:
    """The nodes that losses over classes are taken of, down to where their numbers are made.

    With each the region it is in: the name of the higher-order op whose result the loss is taken of, or "".
    """
    for loss in graph.nodes:
        if loss.op == "call_function" and name_of(loss) in LOSSES:
            node: Any = loss.args[0] if loss.args else loss.kwargs.get("input")
            region = ""
            while isinstance(node, Node):
                yield node, region
                if name_of(node) == "getitem" and is_region(node.args[0]):
                    node, region = made_inside(node), name_of(node.args[0])  # type: ignore[arg-type]
                elif node.op.startswith("call_") and name_of(node) in CARRYING and node.args:
                    node = node.args[0]
                else:
                    break


def is_region(node: object) -> bool:
    return isinstance(node, Node) and isinstance(node.target, HigherOrderOperator)


def made_inside(item: Node) -> object:
    """The node of a region's body that becomes the result that ``item`` reads, or None."""
    region, number = item.args
    body = region.args[0] if isinstance(region, Node) and region.args else None
    module = getattr(item.graph.owning_module, str(body.target), None) if isinstance(body, Node) else None
    if not isinstance(module, GraphModule) or not isinstance(number, int):
        return None
    results = module.graph.output_node().args[0]
    return results[number] if isinstance(results, (list, tuple)) and number < len(results) else None


def unread_head(node: Node, reason: str) -> Iterator[HeadRecord]:
    """The record of a projection that was not read; none where it is no product of tensors."""
    logits, hidden = fake(node), next((fake(n) for n in node.all_input_nodes), None)
    if isinstance(logits, Tensor) and isinstance(hidden, Tensor) and logits.ndim and hidden.ndim:
        sizes = [str(size) for size in logits.shape[:-1]]
        tokens = math.prod(map(int, sizes)) if all(map(str.isdigit, sizes)) else " x ".join(sizes)
        depth, vocab = (int(s) if str(s).isdigit() else 0 for s in (hidden.shape[-1], logits.shape[-1]))
        yield HeadRecord(
            False, reason, place(node), "", tokens, depth, vocab, "built", "",
            bytes_logits=(hint(logits.numel()) or 0) * logits.dtype.itemsize,
            dtype=str(logits.dtype).removeprefix("torch."), device=logits.device.type, module=module(node),
            source=node.meta.get("stack_trace") or "",
        )  # fmt: skip

"""Weights that are whole only while their module runs: FSDP gathers them before its forward and frees them after it.

What is computed in the graph sees them whole, and autograd's saved tensors are gathered again before the backward.
What would read them later, like deferred logits, may find them freed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from fusedhead.analysis.body import Body
from fusedhead.graph.reasons import refuse
from fusedhead.legality.reasons import Illegal

DEEPSPEED = "ds_id"  # what ZeRO-3 calls a parameter by; it empties parameters where they lie

MANAGED = "_is_fsdp_managed_module"  # what FSDP (1 and 2) sets on modules, for Dynamo


def fsdp2_in_use() -> bool:
    return False


def run(body: Body) -> None:
    """Keep heads whose logits are only returned where their weight may be freed before the logits are asked for."""
    if not body.defers:
        body.decisions = [
            decision._replace(reason=decision.reason or refuse(Illegal.GATHERED_WEIGHT))
            if decision.deferred_only
            else decision
            for decision in body.decisions
        ]


def frees_weights(graph: Graph) -> bool:
    """Whether an input of the graph is a weight that its owner frees when the module has run."""
    return any(node.op == "placeholder" and (of_fsdp(node) or of_deepspeed(node)) for node in graph.nodes)


def of_fsdp(node: Node) -> bool:
    """Dynamo marks what it reads from a module that FSDP (1 or 2) manages."""
    source: Any = getattr(node, "_dynamo_source", None)
    guard = getattr(source, "guard_source", None)
    return guard is not None and guard.is_fsdp_module()


def of_deepspeed(node: Node) -> bool:
    return hasattr(getattr(node.meta.get("grapharg"), "example", None), DEEPSPEED)


def given_back_by(module: nn.Module, weight: Tensor) -> bool:
    """The same of a module's weight, outside any graph."""
    return hasattr(weight, DEEPSPEED) or getattr(module, MANAGED, False)

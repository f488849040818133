"""Weights that are whole only while their module runs: FSDP gathers them before its forward and frees them after it.

What is computed in the graph sees them whole, and autograd's saved tensors are gathered again before the backward.
What would read them later, like deferred logits, may find them freed. This file reads the graph's inputs; it must not
know what is made of them.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

REASON = "its weight is whole only while its module runs (FSDP, ZeRO-3), so the returned logits are computed at once"
DEEPSPEED = "ds_id"  # what ZeRO-3 calls a parameter by; it empties parameters where they lie


def given_back(graph: Graph) -> bool:
    """Whether an input of the graph is a weight that its owner frees when the module has run."""
    return any(node.op == "placeholder" and (of_fsdp(node) or of_deepspeed(node)) for node in graph.nodes)


def of_fsdp(node: Node) -> bool:
    """Dynamo marks what it reads from a module that FSDP (1 or 2) manages."""
    source: Any = getattr(node, "_dynamo_source", None)
    found = getattr(source, "guard_source", None)
    return found is not None and found.is_fsdp_module()


def of_deepspeed(node: Node) -> bool:
    return hasattr(getattr(node.meta.get("grapharg"), "example", None), DEEPSPEED)

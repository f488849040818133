"""Weights that are whole only while their module runs: FSDP gathers them before its forward and frees them after it.

What is computed in the graph sees them whole, and autograd's saved tensors are gathered again before the backward.
What would read them later, like deferred logits, finds them freed:

| who owns the weight | what deferred logits are made of                                                              |
|---------------------|-----------------------------------------------------------------------------------------------|
| FSDP2               | the gathered weight; a copy of it, once it is freed (`deferred.gathered_weights`)             |
| FSDP1, ZeRO-3       | nothing: they are computed at once                                                            |

In a process that uses FSDP2 every operand is taken for one that may be freed: a gathered weight that a function is
given as an argument bears no mark. This file reads the graph's inputs; it must not know what is made of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from fusedhead.analysis.body import Body
from fusedhead.graph.reasons import refuse
from fusedhead.legality.reasons import Illegal

FREED = "fusedhead_freed"  # of an input of a graph that was not made by Dynamo, in its meta: its owner frees it
DEEPSPEED = "ds_id"  # what ZeRO-3 calls a parameter by; it empties parameters where they lie
# what frees a gathered weight: a module of torch, a class, its method
FREES = ("torch.distributed.fsdp._fully_shard._fsdp_param", "FSDPParam", "free_unsharded_param")
MANAGED = "_is_fsdp_managed_module"  # what FSDP (1 and 2) sets on modules, for Dynamo


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
    """Whether an input of the graph is a weight that its owner frees when the module has run, and is not copied."""
    return any(
        node.op == "placeholder" and (node.meta.get(FREED) or of_fsdp1(node) or of_deepspeed(node))
        for node in graph.nodes
    )


def of_fsdp1(node: Node) -> bool:
    """Dynamo marks what it reads from a module that FSDP (1 or 2) manages; FSDP1's are views of a flat parameter."""
    source: Any = getattr(node, "_dynamo_source", None)
    found = getattr(source, "guard_source", None)
    if found is None or not found.is_fsdp_module():
        return False
    return not (fsdp2_in_use() and isinstance(example(node), nn.Parameter))


def of_deepspeed(node: Node) -> bool:
    return hasattr(example(node), DEEPSPEED)


def example(node: Node) -> Any:
    """The tensor that an input of a graph was compiled for."""
    return getattr(node.meta.get("grapharg"), "example", None)


def given_back_by(module: nn.Module, weight: Tensor) -> bool:
    """The same of a module's weight, outside any graph: whether its owner frees it when the module has run."""
    return hasattr(weight, DEEPSPEED) or (getattr(module, MANAGED, False) and not fsdp2_in_use())


def fsdp2_in_use() -> bool:
    """Whether this process has given a module to `fully_shard` of torch.distributed.fsdp: it makes a class for it."""
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    # torch's own class below it, of modules that are replicated, is no module's until it is given one
    return cls is not None and any(map(is_of_modules, cls.__subclasses__()))


def is_of_modules(cls: type) -> bool:
    return issubclass(cls, nn.Module) or any(map(is_of_modules, cls.__subclasses__()))


def worth_a_copy(sources: Sequence[Any], shape: Sequence[int]) -> bool:
    """Whether logits of a shape are at least as large as what they are made of, so that it may be copied for them."""
    return sum(x.numel() for x in sources if isinstance(x, Tensor)) <= math.prod(shape)

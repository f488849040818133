"""FSDP: weights that are whole only while their module runs, gathered before its forward and freed after it.

Computation inside the graph reads them whole, and autograd's saved tensors are gathered again before the backward.
Deferred logits read them later, when they are freed:

| who owns the weight | what deferred logits are made of                                                              |
|---------------------|-----------------------------------------------------------------------------------------------|
| FSDP2               | the gathered weight; a copy of it, once it is freed (`deferred.gathered_weights`)             |
| FSDP1, ZeRO-3       | nothing: they are computed at once                                                            |

In a process that uses FSDP2 any operand may be freed: a gathered weight that is passed to a function as an argument
bears no mark.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from fusedhead.analysis.body import Body
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.legality.reasons import Illegal

# in the meta of an input of a graph that Dynamo did not make: why its owner frees it, or None
FREED = "fusedhead_freed"
DEEPSPEED = "ds_id"  # attribute of a parameter under ZeRO-3, which empties parameters in place
# the method that frees a gathered weight: its module, class and name
FREES = ("torch.distributed.fsdp._fully_shard._fsdp_param", "FSDPParam", "free_unsharded_param")
MANAGED = "_is_fsdp_managed_module"  # attribute that FSDP (1 and 2) sets on modules, for Dynamo
UNFLATTENED = "_fsdp_use_orig_params"  # another one: whether Dynamo traces them


def run(body: Body) -> None:
    """Refuse heads whose logits are only returned where their weight may be freed before the logits are read."""
    if not body.defers:
        body.decisions = [
            decision._replace(reason=decision.reason or why_freed(body.graph)) if decision.deferred_only else decision
            for decision in body.decisions
        ]


def why_freed(graph: Graph) -> Refusal:
    flat = any(node.meta.get(FREED) is Illegal.FLAT_WEIGHT for node in graph.nodes)
    return refuse(Illegal.FLAT_WEIGHT) if flat else refuse(Illegal.GATHERED_WEIGHT)


def frees_weights(graph: Graph) -> bool:
    """Whether an input of the graph is a weight that its owner frees after the module and that is not copied."""
    return any(
        node.meta.get(FREED) or of_fsdp1(node) or of_deepspeed(node)
        for node in graph.find_nodes(op="placeholder", sort=False)
    )


def of_fsdp1(node: Node) -> bool:
    """Whether FSDP1 owns an input. Dynamo marks inputs of modules under FSDP (1 or 2); FSDP1's are views of a flat
    parameter.
    """
    source: Any = getattr(node, "_dynamo_source", None)
    guard = getattr(source, "guard_source", None)
    if guard is None or not guard.is_fsdp_module():
        return False
    return not (fsdp2_in_use() and isinstance(example(node), nn.Parameter))


def of_deepspeed(node: Node) -> bool:
    return hasattr(example(node), DEEPSPEED)


def example(node: Node) -> Any:
    """The tensor that an input of a graph was compiled for."""
    return getattr(node.meta.get("grapharg"), "example", None)


def given_back_by(module: nn.Module, weight: Tensor) -> Illegal | None:
    """Why a module's weight, outside of any graph, is freed after the module; None where it is not."""
    if hasattr(weight, DEEPSPEED):
        return Illegal.GATHERED_WEIGHT
    if not getattr(module, MANAGED, False) or fsdp2_in_use():
        return None
    return Illegal.GATHERED_WEIGHT if getattr(module, UNFLATTENED, True) else Illegal.FLAT_WEIGHT


def fsdp2_in_use() -> bool:
    """Whether this process has called `fully_shard` of torch.distributed.fsdp, which makes a class for each module."""
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    # torch's own subclass, for replicated modules, counts only once a module has it
    return cls is not None and any(map(is_of_modules, cls.__subclasses__()))


def is_of_modules(cls: type) -> bool:
    return issubclass(cls, nn.Module) or any(map(is_of_modules, cls.__subclasses__()))


def worth_a_copy(sources: Sequence[Any], shape: Sequence[int]) -> bool:
    """Whether logits of a shape are at least as large as their sources, so that the sources may be copied for them."""
    return sum(x.numel() for x in sources if isinstance(x, Tensor)) <= math.prod(shape)

"""The spellings of ops in a Dynamo graph by role. Every set of op names in the package is built from these.

A name is what `nodes.name_of` returns for a function, a method, an operator or an ATen overload, so that a pass reads
all spellings of an op. A name does not show that a node is pure: `effects` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusedhead.graph.nodes import fake, name_of

# Products of hidden states with a weight. Only these are candidates for a head.
PROJECTIONS = frozenset({"linear", "matmul", "mm", "addmm", "einsum"})

CLASS_LOSSES = frozenset({"cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd"})
# Losses and reductions that can end a head. Only projections that reach one of them are followed.
HEAD_ENDS = CLASS_LOSSES | {"log_softmax", "_log_softmax", "logsumexp", "kl_div"}

# Elementwise ops of one tensor and numbers.
ADDS = frozenset({"add", "__add__", "__radd__"})
SUBTRACTS = frozenset({"sub", "subtract"})
MULTIPLIES = frozenset({"mul", "multiply"})
DIVIDES = frozenset({"div", "divide", "truediv", "true_divide"})
NEGATES = frozenset({"neg", "negative"})
SCALES = ADDS | SUBTRACTS | MULTIPLIES | DIVIDES | NEGATES
CASTS = frozenset({"to", "float", "double", "half", "bfloat16"})
COPIES = frozenset({"contiguous", "clone"})

TRANSPOSES = frozenset({"t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute"})
RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten"})
# Views and sizes. An operand of a replaced node that is one of these is erased with it.
VIEWS = frozenset({"t", "transpose", "T", "mT", "H", "mH", "real", "view", "reshape", "permute"})
REMADE_FREELY = VIEWS | {"size", "to", "float"}

CONCATENATES = frozenset({"cat", "concat", "concatenate"})
JOINS: Mapping[str, Callable[..., Any]] = {**dict.fromkeys(CONCATENATES, torch.cat), "stack": torch.stack}
SPLITS = frozenset({"split", "chunk", "unbind", "tensor_split"})

# Ops that may lie between stacked logits and an output: they change the arrangement or the dtype only.
ARRANGES = RESHAPES | COPIES | {"getitem", "transpose", "permute", "float", "to"}

CHECKPOINTS = frozenset({"tag_activation_checkpoint", "wrap_activation_checkpoint"})


def is_call_of(node: Node, names: frozenset[str] | Mapping[str, Any]) -> bool:
    """Whether a node calls an op by one of these names."""
    return node.op.startswith("call_") and name_of(node) in names


def joined_parts(node: Node) -> tuple[list[Node], int] | None:
    """The tensors that a ``cat`` or ``stack`` joins, and the dimension of the result; None for another node."""
    if not is_call_of(node, JOINS) or not isinstance(fake(node), Tensor) or "out" in node.kwargs:
        return None
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or not isinstance(dim, int):
        return None
    nodes = [part for part in parts if isinstance(part, Node) and isinstance(fake(part), Tensor)]
    return (nodes, dim % fake(node).ndim) if len(nodes) == len(parts) else None


def equation_terms(equation: str) -> tuple[list[str], str]:
    """The letters of each operand of an ``einsum`` and of its result ("" where the equation has none)."""
    operands, _, result = equation.replace(" ", "").partition("->")
    return operands.split(","), result

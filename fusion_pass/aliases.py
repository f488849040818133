"""Which nodes of a Dynamo graph write to memory, and which names share it.

The graph is not functional: ``z /= 2``, ``z[..., 3] = 0`` and ``mul_`` are nodes whose effect other names see. This
file knows nothing of heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Node

from fusedhead.compat import tree_leaves
from fusedhead.read import fake, name_of

INPLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor",
     "ilshift", "irshift", "setitem", "delitem"}
)  # fmt: skip
# the place of ``inplace`` among the arguments of torch.nn.functional's functions
INPLACE_BY_ARGUMENT = {
    "hardsigmoid": 1, "hardswish": 1, "mish": 1, "relu": 1, "relu6": 1, "selu": 1, "silu": 1,
    "celu": 2, "elu": 2, "leaky_relu": 2,
    "alpha_dropout": 3, "dropout": 3, "dropout1d": 3, "dropout2d": 3, "dropout3d": 3, "feature_alpha_dropout": 3,
    "hardtanh": 3, "threshold": 3, "rrelu": 4,
}  # fmt: skip
MUTATING_WRAPPERS = ("triton_kernel_wrapper_mutation", "auto_functionalized")
NOT_MUTATING = frozenset({"requires_grad_", "retain_grad"})


def storage(value: Any) -> int | None:
    """An identity shared by all views of one tensor."""
    if not isinstance(value, Tensor):
        return None
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def written(node: Node) -> Iterator[Node]:
    """The arguments a node writes to (an over-approximation where the node does not say)."""
    if not node.op.startswith("call_"):
        return
    name, schema = name_of(node), getattr(node.target, "_schema", None)
    if schema is not None:
        if schema.is_mutable:
            yield from tensors(node)
        return
    inplace = name.endswith("_") and not name.endswith("__") and name not in NOT_MUTATING
    if (name.startswith("_foreach") and inplace) or any(op in name for op in MUTATING_WRAPPERS):
        yield from tensors(node)
    elif (
        inplace
        or name in INPLACE_OPERATORS
        or node.kwargs.get("inplace") is True
        or node.args[INPLACE_BY_ARGUMENT.get(name, len(node.args)) :][:1] == (True,)
    ):
        yield from tensors(node)[:1]
    elif name == "embedding" and (node.kwargs.get("max_norm") or node.args[3:4] not in ((), (None,))):
        yield from tensors(node)  # rows of the table that are too long are cut in place
    if "out" in node.kwargs:
        yield from (n for n in tree_leaves(node.kwargs["out"]) if isinstance(n, Node))


def tensors(node: Node) -> list[Node]:
    """The nodes among a node's arguments that are tensors."""
    return [n for n in node.all_input_nodes if isinstance(fake(n), Tensor)]

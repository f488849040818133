"""What makes a readable site unsafe to rewrite: mutation, functorch, tensor subclasses.

Each check returns a sentence, or None. The rewrite reads h, W and the labels at another place of the graph than
the program did; nothing may change them in between. This file decides nothing about profit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from fusedhead.interpret import Site, name_of, where
from fusedhead.read import fake
from fusedhead.values import Call, Plain

INPLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor",
     "ilshift", "irshift", "setitem", "delitem"}
)  # fmt: skip
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
    if not node.op.startswith("call_") or name_of(node) in NOT_MUTATING:
        return
    name, schema = name_of(node), getattr(node.target, "_schema", None)
    everything = [n for n in node.all_input_nodes if isinstance(fake(n), Tensor)]
    if schema is not None:
        if schema.is_mutable:
            yield from everything
        return
    inplace = name.endswith("_") and not name.endswith("__")
    if name.startswith("_foreach") and inplace:
        yield from everything
    elif "triton_kernel_wrapper_mutation" in name or "auto_functionalized" in name:
        yield from everything
    elif inplace or name in INPLACE_OPERATORS or node.kwargs.get("inplace") is True:
        yield from everything[:1]
    elif name in ("relu", "dropout", "leaky_relu", "elu", "silu", "mish") and True in node.args:
        yield from everything[:1]
    out = node.kwargs.get("out")
    yield from (n for n in tree_leaves(out) if isinstance(n, Node))


def leaves(refs: Iterable[Any]) -> list[Node]:
    """The graph's own nodes that expressions are made of."""
    found: list[Node] = []
    stack = list(refs)
    while stack:
        ref = stack.pop()
        if isinstance(ref, Node):
            found.append(ref)
        elif isinstance(ref, Plain):
            stack.append(ref.ref)
        elif isinstance(ref, Call):
            stack.extend(tree_leaves((ref.args, ref.kwargs), is_leaf=lambda x: isinstance(x, (Plain, Call))))
    return found


class Mutations:
    """The in-place writes of one graph, by position."""

    def __init__(self, graph: Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.writes = [
            (self.position[node], node, storage(fake(target))) for node in graph.nodes for target in written(node)
        ]

    def between(self, begin: Node, end: Node, read: Iterable[Node]) -> str | None:
        """A sentence if a tensor that shares memory with ``read`` is written in [begin, end)."""
        memory = {storage(fake(node)): node for node in read}
        for at, node, target in self.writes:
            if self.position[begin] <= at < self.position[end] and target in memory and target is not None:
                return f"{name_of(node)} at {where(node)} changes {memory[target].name} in place before the loss"
        return None

    def anywhere_after(self, begin: Node, read: Iterable[Node]) -> str | None:
        memory = {storage(fake(node)): node for node in read}
        for at, node, target in self.writes:
            if self.position[begin] <= at and target in memory and target is not None:
                return f"{name_of(node)} at {where(node)} changes {memory[target].name} in place"
        return None


def functorch(graph: Graph) -> str | None:
    """torch.func transforms need batching and double-backward rules that the fused ops do not have."""
    for node in graph.nodes:
        module = getattr(node.target, "__module__", None) or ""
        if node.op == "call_function" and "_functorch" in f"{module}.{node.target}":
            return f"the graph is inside a torch.func transform ({name_of(node)})"
    return None


def subclass(site: Site, read: Iterable[Node]) -> str | None:
    """Operands must be plain tensors: DTensor, quantised and other subclasses have semantics of their own."""
    for node in [*read, *site.followed]:
        value = fake(node)
        plain = type(value) in (FakeTensor, torch.nn.Parameter) or not isinstance(value, Tensor)
        if not plain or (isinstance(value, Tensor) and value.is_sparse):
            return f"{node.name} is a {type(value).__name__}, not a plain tensor"
    return None

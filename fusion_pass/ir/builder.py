"""The builder: inserts new nodes into a Dynamo graph, each with the fake value that later passes and AOTAutograd read.

Only `OpOverload`s are inserted: a Python function or a node without ``example_value`` would keep the graph out of
AOTAutograd's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fusedhead.compat import maybe_get_fake_mode
from fusedhead.graph.nodes import fake
from fusedhead.graph.sizes import static
from fusedhead.ir.expr import Expr, Plain

aten = torch.ops.aten
REPLACED = "fusedhead_replaced_by"  # in a node's meta, while the graph is being edited


class Emit:
    """Appends ATen calls before an anchor node. A call with several uses is emitted once per anchor."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.anchor: Node | None = None
        self.trace_of: Node | None = None
        self.grad = True
        self.known: dict[Expr, Node] = {}
        self.nodes: list[Node] = []
        # the fake mode of Dynamo's values: the tracing context already holds that of AOTAutograd
        tensors = (fake(node) for node in graph.nodes if isinstance(fake(node), Tensor))
        self.mode = next((m for m in map(maybe_get_fake_mode, tensors) if m is not None), None)

    @contextmanager
    def before(self, anchor: Node, trace_of: Node, *, grad: bool) -> Iterator[Emit]:
        """Emit before ``anchor``, with the source line of ``trace_of`` and the grad mode of that place."""
        before = self.anchor, self.trace_of, self.grad
        self.anchor, self.trace_of, self.grad, self.known = anchor, trace_of, grad, {}
        try:
            yield self
        finally:
            self.anchor, self.trace_of, self.grad = before
            self.known = {}

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        """Append one call. Its fake value is computed on the arguments' fake values."""
        assert self.anchor is not None
        assert self.trace_of is not None
        entries = (x if isinstance(x, (list, tuple)) else (x,) for x in (*args, *kwargs.values()))
        assert not any(type(x) is torch.SymInt for entry in entries for x in entry), "a size without a node"
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(op, args, kwargs)
        self.nodes.append(node)
        values, keywords = map_arg(args, fake), map_arg(kwargs, fake)
        tensors = [v for v in map(fake, node.all_input_nodes) if isinstance(v, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        with (
            torch.set_grad_enabled(self.grad),
            torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext(),
            self.mode or nullcontext(),
        ):
            node.meta["example_value"] = op(*values, **keywords)
        if "stack_trace" in self.trace_of.meta:
            node.meta["stack_trace"] = self.trace_of.meta["stack_trace"]
        return node

    def ref(self, ref: Any) -> Any:
        """The node (or constant) of an expression, emitting its calls."""
        if isinstance(ref, Plain):
            return self.ref(ref.ref)
        while isinstance(ref, Node) and REPLACED in ref.meta:
            ref = ref.meta[REPLACED]
        if not isinstance(ref, Expr):
            return ref
        if ref not in self.known:
            args, kwargs = ref.mapped(self.ref)
            self.known[ref] = self(ref.op, *args, **kwargs)
        return self.known[ref]

    def replaced(self, old: Node, by: Node) -> None:
        """Read ``by`` for ``old`` in expressions from now on: the result of one head may be an operand of another."""
        old.meta[REPLACED] = by

    def sizes(self, node: Node) -> list[Any]:
        """The shape of a node: ints, and nodes for the dimensions that are symbolic."""
        sizes = [static(size) for size in fake(node).shape]
        return [self(aten.sym_size.int, node, d) if size is None else size for d, size in enumerate(sizes)]

    def flat(self, node: Node) -> Node:
        """A tensor with one number a row, flattened to a vector."""
        return node if fake(node).ndim == 1 else self(aten.reshape.default, node, [-1])

    def last(self, node: Node, dim: int) -> Node:
        """Dimension ``dim`` moved last."""
        end = fake(node).ndim - 1
        return node if dim in (-1, end) else self(aten.movedim.int, node, dim, end)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        return node if fake(node).dtype == dtype else self(aten.to.dtype, node, dtype)


def named(node: Node, name: str) -> Node:
    """The node, renamed for readers of the rewritten graph."""
    node._rename(name)
    return node

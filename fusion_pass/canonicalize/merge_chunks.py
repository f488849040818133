"""Logits that are joined from chunks become one product: ``torch.cat([F.linear(x, w) for x in h.chunk(4)])``.

| what is joined                                              | is                                              |
|-------------------------------------------------------------|-------------------------------------------------|
| all slices of one tensor, in order                          | that tensor                                     |
| products of several hidden states with one weight           | the product of the joined hidden states         |
| products of one tensor with several weights, by class       | the product with the joined weights             |
| the same elementwise op of several                          | that op of what is joined                       |

The pass acts only where nothing else reads the chunks or writes to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fusedhead.analysis.body import Body
from fusedhead.analysis.projections import above_losses
from fusedhead.compat import maybe_get_fake_mode
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import callee, every_dimension, fake, name_of
from fusedhead.graph.op_names import (
    CASTS,
    COPIES,
    JOINS,
    PROJECTIONS,
    SCALES,
    SPLITS,
    VIEWS,
    is_call_of,
    joined_parts,
)

# Views of the same memory. A cast is none: it copies the numbers of its time.
SAME_MEMORY = VIEWS | {"size"}
# Elementwise ops of one tensor and numbers, which commute with a join.
CHUNKWISE = SCALES | CASTS | COPIES | {"tanh", "sigmoid"}


class NotMergeable(Exception):
    """The chunks do not make one product."""


def run(body: Body) -> None:
    """Merge the chunks of joined logits. The join nearest to a loss comes first."""
    for node in above_losses(body.facts):
        parts = joined_parts(node)
        if parts is None:
            continue
        merge = ChunkMerge(node, body.facts)
        try:
            whole = merge.merge(*parts)
        except NotMergeable:
            merge.undo()
            continue
        if not merge.products or not merge.is_exact():
            merge.undo()
            continue
        node.replace_all_uses_with(merge.as_fresh_tensor(whole))
        merge.erase()
        body.facts.refresh()


class ChunkMerge:
    """The replacement of one join: the new nodes, and the nodes that become dead."""

    def __init__(self, node: Node, facts: GraphFacts) -> None:
        self.node, self.facts = node, facts
        self.join = JOINS[name_of(node)]
        self.created: list[Node] = []
        self.replaced: list[Node] = [node]  # they read only one another
        self.operands: list[Node] = []  # they are read at another time than before
        self.products = 0

    def emit(self, target: Any, args: tuple, kwargs: dict[str, Any], value: Any, op: str = "call_function") -> Node:
        with self.node.graph.inserting_before(self.node):
            node = self.node.graph.create_node(op, target, args, kwargs)
        node.meta = {k: v for k, v in self.node.meta.items() if k == "stack_trace"} | {"example_value": value}
        self.created.append(node)
        return node

    def evaluated(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The fake value of a call, in the grad mode of the join."""
        mode = maybe_get_fake_mode(fake(self.node))
        assert mode is not None
        with mode, torch.set_grad_enabled(self.facts.grad_mode(self.node)):
            return run(*map_arg(args, fake), **map_arg(kwargs, fake))

    def merge(self, parts: Sequence[Node], dim: int) -> Node:
        """A node equal to the join of ``parts``. Raises NotMergeable."""
        if len({*parts}) != len(parts):
            raise NotMergeable
        source = self.source_of_slices(parts, dim)
        if source is not None:
            return source
        first = parts[0]
        if any((p.op, p.target) != (first.op, first.target) for p in parts) or any(len(p.users) != 1 for p in parts):
            raise NotMergeable
        self.replaced += parts
        if name_of(first) in PROJECTIONS:
            return self.merge_products(parts, dim)
        differ = any(p.args[1:] != first.args[1:] or p.kwargs != first.kwargs for p in parts)
        if name_of(first) not in CHUNKWISE or differ:
            raise NotMergeable
        tensors = [p.args[0] for p in parts]
        if any(not isinstance(x, Node) or p.all_input_nodes != [x] for p, x in zip(parts, tensors)):
            raise NotMergeable
        whole = self.merge(tensors, dim)  # type: ignore[arg-type]
        value = self.evaluated(callee(first), whole, *first.args[1:], **first.kwargs)
        return self.emit(first.target, (whole, *first.args[1:]), dict(first.kwargs), value, first.op)

    def as_fresh_tensor(self, whole: Node) -> Node:
        """A copy with memory of its own, as a join has, so that writes to it stay unseen elsewhere."""
        if whole in self.created:
            return whole
        value = self.evaluated(torch.clone, whole)
        return self.emit("clone", (whole,), {}, value, "call_method")

    def source_of_slices(self, parts: Sequence[Node], dim: int) -> Node | None:
        """The tensor that ``parts`` are all slices of, in order."""
        if any(name_of(p) != "getitem" for p in parts) or len({p.args[0] for p in parts}) != 1:
            return None
        if any(len(p.users) != 1 for p in parts):
            return None
        source, indices = parts[0].args[0], [p.args[1] for p in parts]
        assert isinstance(source, Node)
        value = fake(source)
        if isinstance(value, Tensor):
            entries = [every_dimension(index, value.ndim) for index in indices]
            whole = [(*e[:dim], *e[dim + 1 :]) for e in entries]
            if dim >= value.ndim or any(x != slice(None) for rest in whole for x in rest):
                return None
            if not covers([e[dim] for e in entries], value.shape[dim], self.join):
                return None
            self.replaced += parts
            self.products += name_of(source) in PROJECTIONS
            return source
        if name_of(source) not in SPLITS or indices != list(range(len(value))) or len(source.users) != len(parts):
            return None
        tensor = source.args[0]
        along = source.args[1:2] if name_of(source) == "unbind" else source.args[2:3]
        at = along[0] if along else source.kwargs.get("dim", 0)
        if not isinstance(tensor, Node) or not isinstance(fake(tensor), Tensor) or not isinstance(at, int):
            return None
        if (name_of(source) == "unbind") != (self.join is torch.stack) or at % fake(tensor).ndim != dim:
            return None
        self.replaced += [*parts, source]
        self.products += 1
        return tensor

    def merge_products(self, parts: Sequence[Node], dim: int) -> Node:
        """One product for several: of joined hidden states, or with joined weights."""
        name, join = name_of(parts[0]), self.join
        if name not in ("linear", "matmul", "mm") or any(p.kwargs for p in parts):
            raise NotMergeable
        operands = [p.args[:2] if p.args[2:] == (None,) else p.args for p in parts]
        if any(not isinstance(x, Node) for args in operands for x in args) or len(set(map(len, operands))) > 1:
            raise NotMergeable
        hidden, weights, *biases = zip(*operands)
        self.operands += [x for p in parts for x in p.all_input_nodes]
        self.products += 1
        last = fake(self.node).ndim - 1
        value = self.evaluated(join, list(parts), dim)
        if dim != last and all(map(are_one_tensor, (weights, *biases))) and fake(weights[0]).ndim == 2:
            if name == "mm" and join is torch.stack:
                raise NotMergeable
            args = (self.joined(hidden, dim), weights[0], *(b[0] for b in biases))
        elif dim == last and join is torch.cat and len(set(hidden)) == 1 and all(fake(w).ndim == 2 for w in weights):
            classes = 0 if name == "linear" else 1
            args = (hidden[0], self.joined(weights, classes), *(self.joined(b, 0) for b in biases))
        else:
            raise NotMergeable
        return self.emit(parts[0].target, args, {}, value, parts[0].op)

    def joined(self, parts: Sequence[Node], dim: int) -> Node:
        """The join of operands: the tensor that they are slices of, or a ``cat``."""
        products = self.products
        source = self.source_of_slices(parts, dim) if len({*parts}) == len(parts) else None
        self.products = products
        return source or self.emit(self.join, (list(parts), dim), {}, self.evaluated(self.join, list(parts), dim))

    def is_exact(self) -> bool:
        """Whether nothing between the chunks and their join changes their values."""
        facts, node = self.facts, self.node
        modes = {(facts.grad_mode(n), facts.autocast(n)) for n in (node, *self.replaced)}
        if len(modes) > 1:
            return False
        first = min(self.replaced)  # type: ignore[type-var]
        tensors = [n for n in (*self.replaced, *self.operands) if isinstance(fake(n), Tensor)]
        return facts.write_between(first, node, tensors) is None

    def erase(self) -> None:
        for node in self.replaced:
            if not node._erased and not node.users:
                node.graph.erase_node(node)

    def undo(self) -> None:
        for node in reversed(self.created):
            node.graph.erase_node(node)


def are_one_tensor(nodes: Sequence[Node]) -> bool:
    """Whether nodes are one tensor, or equal views of one."""

    def key(x: Any) -> Any:
        if isinstance(x, Node) and is_call_of(x, SAME_MEMORY):
            return x.op, x.target, str(x.kwargs), tuple(map(key, x.args))
        return x if isinstance(x, Node) else repr(x)

    return len(set(map(key, nodes))) == 1


def covers(entries: Sequence[Any], size: Any, join: Callable[..., Any]) -> bool:
    """Whether indices along one dimension cover it in order."""
    if not isinstance(size, int):
        return False
    if join is torch.stack:
        return all(type(e) is int for e in entries) and [e % size for e in entries] == list(range(size))
    if any(not isinstance(e, slice) for e in entries):
        return False
    if any(not isinstance(x, (int, type(None))) for e in entries for x in (e.start, e.stop, e.step)):
        return False
    bounds = [e.indices(size) for e in entries]
    starts, stops = [0, *(stop for _, stop, _ in bounds)], [start for start, _, _ in bounds]
    return starts[:-1] == stops and starts[-1] == size and all(step == 1 for *_, step in bounds)

"""Logits that are put together from pieces, as one product: ``torch.cat([F.linear(x, w) for x in h.chunk(4)])``.

| what is joined                                              | is                                              |
|-------------------------------------------------------------|-------------------------------------------------|
| all pieces of one tensor, in order                          | that tensor                                     |
| products of several hidden states with one weight           | the product of the joined hidden states         |
| products of one tensor with several weights, by class       | the product with the joined weights             |
| the same elementwise op of several                          | that op of what is joined                       |

Only where nothing else reads the pieces or writes to them. This file edits the graph and decides no head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fusedhead.analysis.projections import above_losses
from fusedhead.compat import enable_python_dispatcher, maybe_get_fake_mode
from fusedhead.graph.modes import autocasts, grad_modes
from fusedhead.graph.nodes import callee, every_dimension, fake, name_of
from fusedhead.legality.checks import Mutations
from fusedhead.rewrite.statistics import PURE_VIEWS
from fusedhead.rules.projections import SPELLINGS

JOINS = {"cat": torch.cat, "concat": torch.cat, "concatenate": torch.cat, "stack": torch.stack}
CUTS = frozenset({"split", "chunk", "unbind", "tensor_split"})
VIEWS = PURE_VIEWS - {"to", "float"}  # a cast is a copy of what was there then
# of one tensor and numbers: element by element, whatever the other elements are
ELEMENTWISE = frozenset(
    {"float", "to", "bfloat16", "half", "contiguous", "clone", "mul", "truediv", "div", "add", "sub", "neg", "tanh",
     "sigmoid"}
)  # fmt: skip


class Apart(Exception):
    """The pieces do not make one product."""


def joins(graph: Graph) -> list[Node]:
    """What is joined on the way from a loss up to its projections, the lowest first."""
    return [node for node in above_losses(graph) if name_of(node) in JOINS]


def join(graph: Graph) -> None:
    """Put pieces of logits together, in place."""
    for node in joins(graph):
        plan = Plan(node)
        try:
            whole = plan.whole(*operands_of(node))
        except Apart:
            plan.undo()
            continue
        if not plan.products or not plan.safe():
            plan.undo()
            continue
        node.replace_all_uses_with(plan.own(whole))
        plan.erase()


def operands_of(node: Node) -> tuple[list[Node], Callable[..., Any], int]:
    """(parts, ``torch.cat`` or ``torch.stack``, dimension of the result) of a join."""
    function = JOINS[name_of(node)]
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or "out" in node.kwargs:
        raise Apart
    nodes = [part for part in parts if isinstance(part, Node) and isinstance(fake(part), Tensor)]
    if len(nodes) != len(parts) or len(nodes) < 2 or not isinstance(fake(node), Tensor):
        raise Apart
    return nodes, function, dim % fake(node).ndim


class Plan:
    """What takes the place of one join: the nodes made for it, and those that it makes needless."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.recorded = grad_modes(node.graph)  # of the program's own nodes
        self.made: list[Node] = []
        self.used: list[Node] = [node]  # read by nobody but one another
        self.operands: list[Node] = []  # read earlier than they were, or later
        self.products = 0

    def emit(self, target: Any, args: tuple, kwargs: dict[str, Any], value: Any, op: str = "call_function") -> Node:
        with self.node.graph.inserting_before(self.node):
            made = self.node.graph.create_node(op, target, args, kwargs)
        made.meta = {k: v for k, v in self.node.meta.items() if k == "stack_trace"} | {"example_value": value}
        self.made.append(made)
        return made

    def evaluated(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The fake value of a call, in the grad mode of the join."""
        mode = maybe_get_fake_mode(fake(self.node))
        assert mode is not None
        with mode, enable_python_dispatcher(), torch.set_grad_enabled(self.recorded[self.node]):
            return run(*map_arg(args, fake), **map_arg(kwargs, fake))

    def whole(self, parts: Sequence[Node], join: Callable[..., Any], dim: int) -> Node:
        """One node that is the join of ``parts``. Raises Apart."""
        if len({*parts}) != len(parts):
            raise Apart
        source = self.uncut(parts, join, dim)
        if source is not None:
            return source
        first = parts[0]
        if any((p.op, p.target) != (first.op, first.target) for p in parts) or any(len(p.users) != 1 for p in parts):
            raise Apart
        self.used += parts
        if name_of(first) in SPELLINGS:
            return self.product(parts, join, dim)
        differ = any(p.args[1:] != first.args[1:] or p.kwargs != first.kwargs for p in parts)
        if name_of(first) not in ELEMENTWISE or differ:
            raise Apart
        inner = [p.args[0] for p in parts]
        if any(not isinstance(x, Node) or p.all_input_nodes != [x] for p, x in zip(parts, inner)):
            raise Apart
        below = self.whole(inner, join, dim)  # type: ignore[arg-type]
        value = self.evaluated(callee(first), below, *first.args[1:], **first.kwargs)
        return self.emit(first.target, (below, *first.args[1:]), dict(first.kwargs), value, first.op)

    def own(self, whole: Node) -> Node:
        """A tensor of its own, as a join is: what is written to it must not be seen by what it was made of."""
        if whole in self.made:
            return whole
        value = self.evaluated(torch.clone, whole)
        return self.emit("clone", (whole,), {}, value, "call_method")

    def uncut(self, parts: Sequence[Node], join: Callable[..., Any], dim: int) -> Node | None:
        """The tensor that ``parts`` are all pieces of, in order."""
        if any(name_of(p) != "getitem" for p in parts) or len({p.args[0] for p in parts}) != 1:
            return None
        if any(len(p.users) != 1 for p in parts):
            return None
        source, indices = parts[0].args[0], [p.args[1] for p in parts]
        assert isinstance(source, Node)
        value = fake(source)
        if isinstance(value, Tensor):
            entries = [every_dimension(index, value.ndim) for index in indices]
            others = [(*e[:dim], *e[dim + 1 :]) for e in entries]
            if dim >= value.ndim or any(x != slice(None) for rest in others for x in rest):
                return None
            if not covers([e[dim] for e in entries], value.shape[dim], join):
                return None
            self.used += parts
            self.products += name_of(source) in SPELLINGS
            return source
        if name_of(source) not in CUTS or indices != list(range(len(value))) or len(source.users) != len(parts):
            return None
        tensor = source.args[0]
        along = source.args[1:2] if name_of(source) == "unbind" else source.args[2:3]
        at = along[0] if along else source.kwargs.get("dim", 0)
        if not isinstance(tensor, Node) or not isinstance(fake(tensor), Tensor) or not isinstance(at, int):
            return None
        if (name_of(source) == "unbind") != (join is torch.stack) or at % fake(tensor).ndim != dim:
            return None
        self.used += [*parts, source]
        self.products += 1
        return tensor

    def product(self, parts: Sequence[Node], join: Callable[..., Any], dim: int) -> Node:
        """One product for several: of joined hidden states, or with joined weights."""
        name = name_of(parts[0])
        if name not in ("linear", "matmul", "mm") or any(p.kwargs for p in parts):
            raise Apart
        given = [p.args[:2] if p.args[2:] == (None,) else p.args for p in parts]
        if any(not isinstance(x, Node) for args in given for x in args) or len(set(map(len, given))) > 1:
            raise Apart
        hidden, weights, *biases = zip(*given)
        self.operands += [x for p in parts for x in p.all_input_nodes]
        self.products += 1
        last = fake(self.node).ndim - 1
        value = self.evaluated(join, list(parts), dim)
        if dim != last and all(map(alike, (weights, *biases))) and fake(weights[0]).ndim == 2:
            if name == "mm" and join is torch.stack:
                raise Apart
            args = (self.joined(hidden, join, dim), weights[0], *(b[0] for b in biases))
        elif dim == last and join is torch.cat and len(set(hidden)) == 1 and all(fake(w).ndim == 2 for w in weights):
            classes = 0 if name == "linear" else 1
            args = (hidden[0], self.joined(weights, join, classes), *(self.joined(b, join, 0) for b in biases))
        else:
            raise Apart
        return self.emit(parts[0].target, args, {}, value, parts[0].op)

    def joined(self, parts: Sequence[Node], join: Callable[..., Any], dim: int) -> Node:
        """The join of operands: what they are pieces of, or a copy."""
        before = self.products
        source = self.uncut(parts, join, dim) if len({*parts}) == len(parts) else None
        self.products = before
        return source or self.emit(join, (list(parts), dim), {}, self.evaluated(join, list(parts), dim))

    def safe(self) -> bool:
        """Whether nothing between the pieces and their join makes them something else."""
        graph, node = self.node.graph, self.node
        recorded, regions, mutations = self.recorded, autocasts(graph), Mutations(graph)
        if any(recorded[u] != recorded[node] or regions[u] != regions[node] for u in self.used):
            return False
        first = min(self.used, key=mutations.position.__getitem__)
        read = [u for u in (*self.used, *self.operands) if isinstance(fake(u), Tensor)]
        return mutations.between(first, node, read) is None

    def erase(self) -> None:
        for node in self.used:
            if not node._erased and not node.users:
                node.graph.erase_node(node)

    def undo(self) -> None:
        for node in reversed(self.made):
            node.graph.erase_node(node)


def alike(nodes: Sequence[Node]) -> bool:
    """Whether nodes are one tensor, be it viewed anew for each of them."""

    def key(x: Any) -> Any:
        viewed = isinstance(x, Node) and x.op.startswith("call_") and name_of(x) in VIEWS
        if viewed:
            return x.op, x.target, str(x.kwargs), tuple(map(key, x.args))
        return x if isinstance(x, Node) else repr(x)

    return len(set(map(key, nodes))) == 1


def covers(entries: Sequence[Any], size: Any, join: Callable[..., Any]) -> bool:
    """Whether indices along one dimension take all of it, in order."""
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

"""Dense targets built from labels, ``zeros_like(z).scatter(1, y, 1)``: a sum over one becomes sums and picks.

With t = a everywhere and b at the label y of a row, both numbers:

    Σ_v t_v x_v  =  a Σ_v x_v + (b - a) x_y

The right side reads statistics only, so that neither t [N, V] nor the product is built. The pass reads ``zeros_like``,
``full_like`` and the like, ``fill_``, ``scatter`` in both forms, ``one_hot``, and affine functions of them.

The pass rewrites where a and b have one sign and ``|b| > |a| > 0``. Both sides are then infinite or NaN for the same x:
on the right, infinities of opposite signs meet only where they meet on the left. No digits cancel: both terms of the
right side have the sign that the label's x has on the left. With b = 0 the label's x, -1e30 under a mask, would be
added and subtracted again. With a = 0 (a label alone) an infinite sum may be infinite for another class, and 0 times
that infinity is NaN. Such targets stay and are computed token by token. The graph is edited only where nothing else
reads t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fusedhead.analysis.body import Body
from fusedhead.canonicalize.functionalize_subscripts import comes_from_a_projection
from fusedhead.graph.aliases import storages
from fusedhead.graph.effects import may_write
from fusedhead.graph.facts import before
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.sizes import static
from fusedhead.ir.builder import Emit

aten = torch.ops.aten
FILLED = {"zeros_like": 0.0, "new_zeros": 0.0, "zeros": 0.0, "ones_like": 1.0, "new_ones": 1.0, "ones": 1.0}
KEEPS_NUMBERS = frozenset({"float", "to", "type_as", "double", "contiguous", "detach"})


@dataclass(frozen=True)
class Target:
    """A tensor [..., V] with ``rest`` everywhere, but ``at`` where ``index`` [..., 1] says; made by ``nodes``."""

    rest: float
    at: float
    index: Node | None  # None: no label yet
    labels: bool  # whether the index is the labels [...] without a dimension of classes
    nodes: frozenset[Node]

    def affine(self, function: Callable[[float], float], node: Node) -> Target:
        return replace(self, rest=function(self.rest), at=function(self.at), nodes=self.nodes | {node})


def run(body: Body) -> None:
    """Replace sums of products with such targets."""
    graph = body.graph
    if not body.facts.named(("scatter", "scatter_", "one_hot")):
        return
    for node in list(graph.nodes):
        if not node._erased and name_of(node) == "sum" and isinstance(fake(node), Tensor):
            expand_sum(graph, node, body.facts.grad_mode(node))


def is_real_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def target_of(node: Any, reader: Node) -> Target | None:
    """The target that a node is when ``reader`` runs."""
    if not isinstance(node, Node) or not isinstance(fake(node), Tensor) or not node.op.startswith("call_"):
        return None
    name = name_of(node)
    args: Any = node.args
    if name in FILLED or name in ("full_like", "new_full", "full", "empty_like"):
        return filled(node, reader)
    if name in ("scatter", "scatter_", "fill_"):
        base = target_of(args[0], node) if name == "scatter" else filled(args[0], reader)
        if base is None or name != "scatter":
            return base if base is None or node in base.nodes else None
        return scattered(base, node)
    if name == "one_hot":
        classes: Any = args[1] if len(args) > 1 else node.kwargs.get("num_classes", -1)
        labels = args[0] if isinstance(args[0], Node) else None
        is_known = is_real_number(classes) and classes > 0 and labels is not None and fake(labels).dtype == torch.int64
        return Target(0.0, 1.0, labels, True, frozenset({node})) if is_known else None
    return combined(node, name, args)


def combined(node: Node, name: str, args: tuple) -> Target | None:
    """The target that results from an affine op on targets."""
    target = target_of(args[0], node) if args else None
    other = args[1] if len(args) > 1 else None
    if name in KEEPS_NUMBERS:
        return target and target.affine(lambda x: x, node)
    if name == "neg":
        return target and target.affine(lambda x: -x, node)
    if len(args) != 2 or node.kwargs:
        return None
    if target is not None and is_real_number(other):
        does = {"mul": lambda x: x * other, "truediv": lambda x: x / other, "div": lambda x: x / other,
                "add": lambda x: x + other, "sub": lambda x: x - other, "rsub": lambda x: other - x}  # fmt: skip
        return target.affine(does[name], node) if name in does and (other or name in ("add", "sub", "mul")) else None
    second = target_of(other, node)
    if second is not None and is_real_number(args[0]):
        turned = {"mul": lambda x: args[0] * x, "add": lambda x: args[0] + x, "sub": lambda x: args[0] - x}
        return second.affine(turned[name], node) if name in turned else None
    if target is None or second is None or name not in ("add", "sub") or target.index is not second.index:
        return None
    sign = 1 if name == "add" else -1
    both = target.nodes | second.nodes | {node}
    return replace(target, rest=target.rest + sign * second.rest, at=target.at + sign * second.at, nodes=both)


def scattered(base: Target, node: Node) -> Target | None:
    """``base`` with a number at the labels."""
    arguments: dict[str, Any] = dict(zip(("dim", "index", "value"), node.args[1:])) | node.kwargs
    dim, index, value = arguments.get("dim"), arguments.get("index"), arguments.get("value", arguments.get("src"))
    if set(arguments) - {"dim", "index", "value", "src"} or not isinstance(index, Node):
        return None
    if value is None or not is_real_number(value):
        return None
    ndim, labels = fake(node).ndim, fake(index)
    if not isinstance(dim, int) or dim % ndim != ndim - 1 or base.index is not None:
        return None
    if not isinstance(labels, Tensor) or labels.ndim != ndim or static(labels.shape[-1]) != 1:
        return None
    return replace(base, at=float(value), index=index, labels=False, nodes=base.nodes | {node})


def filled(node: Any, reader: Node) -> Target | None:
    """A tensor filled with a number, after the writes to it before ``reader``, all of which must be read."""
    while isinstance(node, Node) and name_of(node) in ("fill_", "scatter_"):
        node = node.args[0]
    if not isinstance(node, Node):
        return None
    name = name_of(node)
    fill_value: Any = FILLED.get(name)
    if name in ("full_like", "new_full", "full"):
        fill_value = node.kwargs.get("fill_value", node.args[1] if len(node.args) == 2 else None)
        fill_value = node.args[2] if name == "new_full" and len(node.args) > 2 else fill_value
    if not is_real_number(fill_value) and name not in ("empty_like",):
        return None
    target = Target(float(fill_value or 0.0), float(fill_value or 0.0), None, False, frozenset({node}))
    is_filled, at = name != "empty_like", storages(node)
    for write in node.graph.nodes:
        if not may_write(write, at):
            continue
        if not before(write, reader) and write is not reader:
            return None
        if name_of(write) == "fill_" and len(write.args) == 2 and is_real_number(write.args[1]):
            number_given: Any = write.args[1]
            filling = float(number_given)
            target, is_filled = Target(filling, filling, None, False, target.nodes | {write}), True
        elif name_of(write) == "scatter_" and (after := scattered(target, write)) is not None and is_filled:
            target = after
        else:
            return None
    return target if is_filled else None


def expand_sum(graph: Graph, total: Node, recorded: bool) -> None:
    """Replace a sum over the classes of a product with a target by sums and picks of the other factor."""
    product = total.args[0] if total.args else None
    dims: Any = total.args[1] if len(total.args) > 1 else total.kwargs.get("dim")
    keep = total.kwargs.get("keepdim", total.args[2] if len(total.args) > 2 else False)
    scale = 1.0
    chain: list[Node] = []
    while isinstance(product, Node) and name_of(product) == "neg" and len(product.users) == 1:
        chain.append(product)
        scale, product = -scale, product.args[0]
    if not isinstance(product, Node) or name_of(product) != "mul" or len(product.args) != 2 or len(product.users) != 1:
        return
    for side in (0, 1):
        target, x = target_of(product.args[side], product), product.args[1 - side]
        if target is not None and target.index is not None and isinstance(x, Node):
            break
    else:
        return
    value, ndim = fake(x), fake(product).ndim
    listed = [dims] if isinstance(dims, int) else list(dims or range(ndim))
    if {d % ndim for d in listed} not in ({ndim - 1}, set(range(ndim))) or set(total.kwargs) - {"dim", "keepdim"}:
        return
    like = isinstance(value, Tensor) and value.shape == fake(product).shape and value.dtype == torch.float32
    if not like or fake(product).dtype != value.dtype:
        return
    if not is_read_only_by(target, product) or not comes_from_a_projection(x) or not keeps_digits(target):
        return
    emit = Emit(graph)
    with emit.before(total, total, grad=recorded):
        index = emit(aten.unsqueeze.default, target.index, -1) if target.labels else target.index
        sums = emit(aten.sum.dim_IntList, x, [-1], True)
        picked = emit(aten.gather.default, x, ndim - 1, index)
        result = emit(
            aten.add.Tensor,
            emit(aten.mul.Tensor, sums, scale * target.rest),
            emit(aten.mul.Tensor, picked, scale * (target.at - target.rest)),
        )
        if len(listed) == 1:
            result = result if keep else emit(aten.squeeze.dim, result, -1)
        else:
            result = emit(aten.sum.default, result)
    total.replace_all_uses_with(result)
    for node in (total, *chain, product):
        graph.erase_node(node)
    for node in sorted(target.nodes, reverse=True):  # type: ignore[type-var]
        graph.erase_node(node)


def keeps_digits(target: Target) -> bool:
    """Whether both sides of the equation have the same infinities, NaN and digits, whatever x is."""
    a, b = target.rest, target.at
    return a * b > 0 and abs(b) > abs(a)


def is_read_only_by(target: Target, product: Node) -> bool:
    """Whether only the product reads a target and the nodes that make it."""
    return all(user in target.nodes or user is product for node in target.nodes for user in node.users)

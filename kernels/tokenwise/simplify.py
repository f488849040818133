"""Algebra on the traced graph of a window that spares passes over its logits.

    softmax(x), log_softmax(x)    = exp(d - log s), d - log s            d = x - max x, s = Σ exp d: once for each x
    xlogy(p, p)                   = p (d - log s), 0 where p = 0         p = softmax(x)
    dlog_softmax(g)               = g - p Σ g
    Σ c p = c,  Σ (-c)[v = y] = -c,  Σ (a + b) = Σ a + Σ b               sums over a row that need no pass; c one a row
    Σ_v scatter_add(0, i, g)      = Σ_k g                                of the gradient of a gather
    logsumexp(stack(a, b))        = m + log(exp(a - m) + exp(b - m))     m = max(a, b): nothing is stacked

Every sum over a row is a pass over the window's logits before the next op can begin. For a divergence to a frozen
teacher Σ g is known, so that the loss and dz come from one pass after the one for max and s. Values change by float32
roundings only, and where a row of x is not finite, all of its results are NaN as before.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from fusedhead.kernels.tokenwise.unstack import shape_of, unstack

aten = torch.ops.aten
LOG_SOFTMAX = aten._log_softmax.default
LOG_SOFTMAX_GRADIENT = aten._log_softmax_backward_data.default
NLL_GRADIENT = aten.nll_loss_backward.default
EXACTLY_WIDER: dict[torch.dtype | None, tuple[torch.dtype, ...]] = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
NONE = 0  # reduction="none"


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a traced value; None for anything else."""
    meta = node.meta.get("tensor_meta") if isinstance(node, Node) else None
    return getattr(meta, "dtype", None)


def is_rows(node: Any) -> bool:
    """Whether a value is a float32 matrix of several columns."""
    shape = shape_of(node)
    return len(shape) == 2 and shape[1] > 1 and dtype_of(node) == torch.float32


class RowStatistic(NamedTuple):
    """max and log Σ exp(· - max) of the rows of ``scale`` times an input, which a graph takes as two more inputs."""

    at: int  # of the input [n, V]
    scale: float


def is_zero(node: Any) -> bool:
    """Whether a traced value is made of zeros, and has no other use that could write to it."""
    made = isinstance(node, Node) and node.target in (aten.new_zeros.default, aten.zeros_like.default)
    return made and len(node.users) == 1


def simplify(module: GraphModule, taken: Collection[int] = ()) -> list[RowStatistic]:
    """Rewrite the graph of a window in place.

    The row statistics of the inputs ``taken`` become inputs themselves: max and log Σ, [n, 1] each, behind the others
    for each `RowStatistic` returned.
    """
    graph = module.graph
    for target in (
        aten.detach.default,
        aten.alias.default,
    ):  # nothing is differentiated any more; names differ by torch
        for node in graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    drop_casts_there_and_back(graph)
    unstack(graph)
    normalizers: dict[Node, Normalizer] = {}
    for node in list(graph.nodes):
        if node.target in (LOG_SOFTMAX, aten._softmax.default) and is_rows(node.args[0]) and node.args[1] in (1, -1):
            x = node.args[0]
            if x not in normalizers:
                normalizers[x] = Normalizer(graph, x)
            normalizer = normalizers[x]
            node.replace_all_uses_with(normalizer.log_p if node.target == LOG_SOFTMAX else normalizer.p)
            graph.erase_node(node)
    softmaxes = {each.p: each for each in normalizers.values()}
    logarithms = {each.log_p: each for each in normalizers.values()}
    for node in list(graph.nodes):
        if node.target == aten.xlogy.Tensor and node.args[0] is node.args[1] and node.args[0] in softmaxes:
            normalizer = softmaxes[node.args[0]]
            with graph.inserting_before(node):
                zero = graph.call_function(aten.eq.Scalar, (normalizer.p, 0))
                product = graph.call_function(aten.mul.Tensor, (normalizer.p, normalizer.log_p))
                replacement = graph.call_function(aten.masked_fill.Scalar, (product, zero, 0))
        elif node.target == LOG_SOFTMAX_GRADIENT and node.args[1] in logarithms and node.args[3] == torch.float32:
            normalizer, g = logarithms[node.args[1]], node.args[0]
            with graph.inserting_before(node):
                total = RowSums(graph, softmaxes).of(g)
                if total is None:
                    total = graph.call_function(aten.sum.dim_IntList, (g, [1], True))
                product = graph.call_function(aten.mul.Tensor, (normalizer.p, total))
                replacement = graph.call_function(aten.sub.Tensor, (g, product))
        else:
            continue
        replacement.meta["tensor_meta"] = node.meta["tensor_meta"]
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    statistics = [found for each in normalizers.values() if (found := take(graph, each, taken)) is not None]
    graph.eliminate_dead_code()
    module.recompile()
    return statistics


def drop_casts_there_and_back(graph: Graph) -> None:
    """Drop a rounding to the dtype that the value had before it was widened: it changes no number."""
    for node in graph.find_nodes(op="call_function", target=aten._to_copy.default):
        wide = node.args[0]
        if not isinstance(wide, Node) or wide.target != aten._to_copy.default or not is_plain_cast(wide):
            continue
        source, exact = wide.args[0], EXACTLY_WIDER.get(dtype_of(wide.args[0]), ())
        if is_plain_cast(node) and dtype_of(node) == dtype_of(source) and dtype_of(wide) in exact:
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()


def is_plain_cast(node: Node) -> bool:
    """Whether a copy changes nothing but the dtype."""
    return node.kwargs.get("layout") in (None, torch.strided) and not set(node.kwargs) - {"dtype", "layout", "device"}


def take(graph: Graph, normalizer: Normalizer, taken: Collection[int]) -> RowStatistic | None:
    """Make the max and sum of x inputs, where x is a positive number times an input."""
    placeholders = graph.find_nodes(op="placeholder")
    scale, x = 1.0, normalizer.x
    while x.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(x.args[1], (int, float)) and x.args[1] > 0:
        scale = scale * x.args[1] if x.target == aten.mul.Tensor else scale / x.args[1]
        x = x.args[0]  # type: ignore[assignment]
    if x.target == aten._to_copy.default:
        x = x.args[0]  # type: ignore[assignment]
    if x not in placeholders or placeholders.index(x) not in taken or not 0 < scale < math.inf:
        return None
    with graph.inserting_after(placeholders[-1]):
        log_total = graph.placeholder(f"log_total_{len(placeholders)}")
        top = graph.placeholder(f"top_{len(placeholders)}")
    normalizer.top.replace_all_uses_with(top)
    normalizer.log_total.replace_all_uses_with(log_total)
    return RowStatistic(placeholders.index(x), scale)


class Normalizer:
    """The softmax of the rows of x: nodes right behind x."""

    def __init__(self, graph: Graph, x: Node) -> None:
        self.x = x

        def call(op: Any, *args: Any) -> Node:
            return graph.call_function(op, args)

        with graph.inserting_after(x):
            anchor = graph.call_function(aten.amax.default, (x, [1], True))
        self.top = anchor
        after = anchor.next
        with graph.inserting_before(after):
            distance = call(aten.sub.Tensor, x, anchor)
            total = call(aten.sum.dim_IntList, call(aten.exp.default, distance), [1], True)
            self.log_total = call(aten.log.default, total)
            self.log_p = call(aten.sub.Tensor, distance, self.log_total)
            self.p = call(aten.exp.default, self.log_p)
            self.log_p.meta["tensor_meta"] = self.p.meta["tensor_meta"] = x.meta["tensor_meta"]


class RowSums:
    """Sums over the columns of traced values that need no pass over the columns."""

    def __init__(self, graph: Graph, softmaxes: dict[Node, Normalizer]) -> None:
        self.graph, self.softmaxes = graph, softmaxes

    def call(self, op: Any, *args: Any) -> Node:
        return self.graph.call_function(op, args)

    def of(self, node: Any) -> Node | None:
        """Σ of a value's columns, [n, 1]; None where unknown."""
        if not isinstance(node, Node):
            return None
        if node in self.softmaxes:  # 1, or NaN where the softmax is
            each = self.softmaxes[node]
            nothing = self.call(aten.mul.Tensor, self.call(aten.add.Tensor, each.top, each.log_total), 0)
            return self.call(aten.add.Tensor, nothing, 1)
        if node.target == NLL_GRADIENT:
            return self._of_nll(node)
        if node.target == aten.scatter_add.default and node.args[1] in (1, -1) and is_zero(node.args[0]):
            return self.call(aten.sum.dim_IntList, node.args[3], [1], True)
        if node.target == aten.neg.default:
            total = self.of(node.args[0])
            return None if total is None else self.call(aten.neg.default, total)
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            return self._of_product(node)
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            a, b = (self.of(x) if shape_of(x) == shape_of(node) else None for x in node.args)
            return None if a is None or b is None else self.call(node.target, a, b)
        return None

    def _of_product(self, node: Node) -> Node | None:
        a, b = node.args
        for factor, other, swapped in ((b, a, False), (a, b, True)):
            if swapped and node.target == aten.div.Tensor:
                return None
            column = self.column(factor)
            if column is None or shape_of(other) != shape_of(node):
                continue
            total = self.of(other)
            if total is not None:
                return self.call(node.target, total, column)
        return None

    def _of_nll(self, node: Node) -> Node | None:
        """The sum of an nll gradient, -g at labels that are not ignored and zero elsewhere; without class weights."""
        g, x, target, weight, reduction, ignored = node.args[:6]
        if weight is not None or reduction != NONE or len(shape_of(x)) != 2 or len(shape_of(g)) != 1:
            return None
        kept = self.call(aten.masked_fill.Scalar, g, self.call(aten.eq.Scalar, target, ignored), 0)
        return self.call(aten.unsqueeze.default, self.call(aten.neg.default, kept), 1)

    def column(self, node: Any) -> Any:
        """A factor with one number a row, as a number or as [n, 1]; None for any other factor."""
        if isinstance(node, (int, float)):
            return node
        shape = shape_of(node)
        if len(shape) == 2 and shape[1] == 1:
            return node
        if not isinstance(node, Node) or len(shape) != 2:
            return None
        if node.target == aten.expand.default:
            inner = shape_of(node.args[0])
            return node.args[0] if len(inner) == 2 and inner[1] == 1 else None
        if node.target == aten.neg.default:
            column = self.column(node.args[0])
            return None if column is None else self.call(aten.neg.default, column)
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            a, b = (self.column(x) for x in node.args)
            return None if a is None or b is None else self.call(node.target, a, b)
        return None

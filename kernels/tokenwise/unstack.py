"""Unstacking: ops on a stack of matrices [n, V] become ops on each, so that no stack [n, k, V] is built.

    stack(a, b) - unsqueeze(c)    ->  a - c, b - c          pointwise ops, on each
    logsumexp(stack(a, b), 1)     ->  m + log(exp(a - m) + exp(b - m)),  m = max(a, b), 0 where it is infinite
    select(stack(a, b), 1, i)     ->  a or b

The mixture of a Jensen-Shannon divergence is written as the logsumexp of a stack; as such it takes two float32 tensors
of twice the logits' size, and its gradient two more. All ops are those of the graph, on the same values.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
POINTWISE = {
    getattr(aten, name).default for name in ("abs", "exp", "log", "neg", "tanh", "sigmoid")
} | {getattr(aten, name).Tensor for name in ("add", "div", "mul", "sub")}  # fmt: skip
MOST = 4  # matrices in a stack


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a traced value; () for anything else."""
    meta = node.meta.get("tensor_meta") if isinstance(node, Node) else None
    return tuple(meta.shape) if hasattr(meta, "shape") else ()


def unstack(graph: Graph) -> None:
    """Replace the results of ops on stacks. The ops themselves stay for other uses, or are dead."""
    parts: dict[Node, list[Node]] = {}  # the matrices of each value [n, k, V] that is a stack
    if not graph.find_nodes(op="call_function", target=aten.stack.default):
        return
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        with graph.inserting_before(node):
            found = _parts(graph, node, parts)
            if found is not None:
                parts[node] = found
                continue
            whole = _whole(graph, node, parts)
        if whole is not None:
            whole.meta.setdefault("tensor_meta", node.meta.get("tensor_meta"))
            node.replace_all_uses_with(whole)
    graph.eliminate_dead_code()


def _parts(graph: Graph, node: Node, parts: dict[Node, list[Node]]) -> list[Node] | None:
    """The matrices of a value that is a stack of them."""
    args = node.args
    if node.target == aten.stack.default and len(args) == 2 and args[1] == 1 and len(args[0]) <= MOST:  # type: ignore[arg-type]
        return list(args[0]) if all(len(shape_of(x)) == 2 for x in args[0]) else None  # type: ignore[union-attr, arg-type]
    if node.target == aten.unsqueeze.default and args[1] == 1 and len(shape_of(args[0])) == 2:
        return [args[0]]  # type: ignore[list-item]
    if node.target not in POINTWISE or node.kwargs or len(shape_of(node)) != 3:
        return None
    if not all(x in parts if isinstance(x, Node) and shape_of(x) else True for x in args):
        return None
    count = shape_of(node)[1]
    if count > MOST:
        return None
    found = []
    for i in range(count):
        each = [parts[x][i if len(parts[x]) > 1 else 0] if x in parts else x for x in args]  # type: ignore[index]
        found.append(graph.call_function(node.target, tuple(each)))  # type: ignore[arg-type]
        n, _, vocab = shape_of(node)
        found[-1].meta["tensor_meta"] = node.meta["tensor_meta"]._replace(shape=torch.Size((n, vocab)))
    return found


def _whole(graph: Graph, node: Node, parts: dict[Node, list[Node]]) -> Node | None:
    """The one matrix that a node computes from the matrices of a stack."""
    args = node.args
    if not args or not isinstance(args[0], Node) or args[0] not in parts or node.kwargs:
        return None
    matrices = parts[args[0]]
    if len(matrices) != shape_of(args[0])[1]:
        return None
    if node.target == aten.select.int and args[1] == 1 and isinstance(args[2], int):
        return matrices[args[2]]
    if node.target == aten.squeeze.dim and args[1] == 1 and len(matrices) == 1:
        return matrices[0]
    if node.target not in (aten.logsumexp.default, aten.sum.dim_IntList) or list(args[1]) != [1] or len(args) > 2:  # type: ignore[arg-type]
        return None

    def call(op: Any, *args: Any) -> Node:
        return graph.call_function(op, args)

    def total(terms: list[Node]) -> Node:
        return reduce(lambda a, b: call(aten.add.Tensor, a, b), terms)

    if node.target == aten.sum.dim_IntList:
        return total(matrices)
    top = reduce(lambda a, b: call(aten.maximum.default, a, b), matrices)
    top = call(aten.masked_fill.Scalar, top, call(aten.eq.Scalar, call(aten.abs.default, top), float("inf")), 0)
    exponentials = [call(aten.exp.default, call(aten.sub.Tensor, x, top)) for x in matrices]
    return call(aten.add.Tensor, call(aten.log.default, total(exponentials)), top)

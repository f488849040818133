"""Recipients: tensors that take the gradient in place of hidden states, so that it is rounded after its sum over ranks.

    whole, token = gather_tokens(x, 1, ranks, group)        recipient, token = hidden_sum(x, 1, ranks, group)
    h = reshape(whole, [-1, D])                             r = reshape(recipient, [-1, D])
                        shard_stats(h, w, y, ..., recipient=r)

The row steps that gathered hidden states have gone through are applied to the recipient too.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import fusedhead.lowering.hidden_sum
import fusedhead.lowering.token_shards  # noqa: F401  both register torch.ops.fusedhead
from fusedhead.compat import OpOverload
from fusedhead.graph.nodes import fake
from fusedhead.ir.builder import Emit, named
from fusedhead.rewrite.loss_tail import differentiable

aten = torch.ops.aten
GATHER = torch.ops.fusedhead.gather_tokens.default
SUM = torch.ops.fusedhead.hidden_sum.default


def to_scatter(emit: Emit, h: Node) -> dict[str, Node]:
    """The argument of a sweep whose hidden states were gathered; none where they are not made of a gather alone."""
    if not differentiable(h):
        return {}
    recipient = remade(emit, h, {})
    return {} if recipient is None else {"recipient": recipient}


def to_sum(emit: Emit, h: Node, group: Any) -> dict[str, Node]:
    """The argument of a sweep whose hidden states every rank has whole."""
    return {"recipient": named(emit(operator.getitem, emit(SUM, h, -1, 1, group), 0), "recipient")}


def remade(emit: Emit, node: Node, copies: dict[Node, Node | None]) -> Node | None:
    """A node recomputed from recipients; None where other numbers enter it."""
    if node not in copies:
        copies[node] = remake(emit, node, copies)
    return copies[node]


def remake(emit: Emit, node: Node, copies: dict[Node, Node | None]) -> Node | None:
    if node.target is operator.getitem and node.args[0].target is GATHER:  # type: ignore[union-attr]
        gather: Any = node.args[0]
        return named(emit(operator.getitem, emit(SUM, *gather.args[:4]), 0), "recipient")
    numbers = [source for source in node.all_input_nodes if carries_numbers(source)]
    if not isinstance(node.target, OpOverload) or not numbers:
        return None
    again = {source: remade(emit, source, copies) for source in numbers}
    if any(copy is None for copy in again.values()):
        return None
    if node.target is aten.to.dtype:  # a recipient keeps its dtype
        return again[numbers[0]]
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: again.get(n, n))
    return emit(node.target, *args, **kwargs)


def carries_numbers(node: Node) -> bool:
    return isinstance(fake(node), Tensor) and fake(node).is_floating_point()

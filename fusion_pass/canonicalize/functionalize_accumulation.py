"""Sums that a loop writes into one scalar, ``total += loss``, as sums of two tensors each.

Exact where no other name sees the memory that is written, and nothing reads the old value afterwards. What comes
between the losses is then free of writes, so that they can be looked at, and computed, together. This file knows
nothing of heads.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.node import map_arg

from fusedhead.compat import maybe_get_fake_mode
from fusedhead.graph.aliases import storage
from fusedhead.graph.facts import before
from fusedhead.graph.modes import grad_modes
from fusedhead.graph.nodes import callee, fake

FUNCTIONS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
METHODS = {"add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div"}


def out_of_place(node: Node) -> Any:
    """What computes the same without writing, or None for any other node."""
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    return METHODS.get(str(node.target)) if node.op == "call_method" else None


def separate(graph: Graph) -> None:
    """Replace writes into scalars that nothing else sees, in place."""
    writes = [node for node in graph.nodes if out_of_place(node) is not None]
    if not writes:
        return
    recorded, sharing = grad_modes(graph), dict[int | None, list[Node]]()
    for node in graph.nodes:
        sharing.setdefault(storage(fake(node)), []).append(node)
    for node in writes:
        target = node.args[0]
        if not isinstance(target, Node):  # a number: nothing is written
            node.target = out_of_place(node)
        elif unseen(node, target, sharing) and (recorded[node] or not fake(target).requires_grad):
            memory = storage(fake(node))
            become(node, recorded[node])
            sharing[memory].remove(node)
            sharing.setdefault(storage(fake(node)), []).append(node)


def unseen(node: Node, target: Node, sharing: dict[int | None, list[Node]]) -> bool:
    """Whether nobody but ``node`` reads the memory of ``target``, a scalar, from ``node`` on.

    ``sharing``: the nodes by the memory that they share, in order.
    """
    value = fake(target)
    if not isinstance(value, Tensor) or not target.op.startswith("call_") or learnt(value):
        return False
    if not statically_known_true(sym_eq(value.numel(), 1)) or any(before(node, user) for user in target.users):
        return False
    memory = storage(value)
    names = sharing[memory]
    return memory is not None and all(other is target for other in names[: bisect_left(names, node)])  # type: ignore


def learnt(value: Tensor) -> bool:
    """Whether gradients are for a tensor itself; so it is held of one that autograd forbids to ask (a view of memory
    written in another grad mode)."""
    try:
        return value.requires_grad and value.is_leaf
    except RuntimeError:
        return True


def become(node: Node, recorded: bool) -> None:
    """Make a write an op with a result of its own, unless that would have another dtype or shape."""
    before = node.target
    node.target = out_of_place(node)
    args, kwargs = map_arg((node.args, node.kwargs), fake)
    value = fake(node)
    with maybe_get_fake_mode(value), torch.set_grad_enabled(recorded):  # type: ignore[union-attr]
        made = callee(node)(*args, **kwargs)
    if made.dtype == value.dtype and made.shape == value.shape:
        node.meta["example_value"] = made
    else:
        node.target = before

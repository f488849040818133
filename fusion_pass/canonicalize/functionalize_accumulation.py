"""Accumulation into a scalar, ``total += loss``, becomes an op that writes nothing: ``total = total + loss``.

Exact where no other name sees the memory that is written, and nothing reads the old value afterwards. The nodes between
the losses of a loop then write nothing, so that one sweep can compute all of the losses.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.node import map_arg

from fusedhead.analysis.body import Body
from fusedhead.compat import maybe_get_fake_mode
from fusedhead.graph.aliases import storage
from fusedhead.graph.facts import before
from fusedhead.graph.nodes import callee, fake

FUNCTIONS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
METHODS = {"add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div"}


def out_of_place(node: Node) -> Any:
    """The op that computes the same without writing; None for any other node."""
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    return METHODS.get(str(node.target)) if node.op == "call_method" else None


def run(body: Body) -> None:
    """Replace writes into scalars whose memory has no other reader."""
    writes = [node for node in body.graph.nodes if out_of_place(node) is not None]
    if not writes:
        return
    sharing: dict[int | None, list[Node]] = {}
    for node in body.graph.nodes:
        sharing.setdefault(storage(fake(node)), []).append(node)
    for node in writes:
        target = node.args[0]
        if not isinstance(target, Node):  # a number: nothing is written
            node.target = out_of_place(node)
            body.edited(node)
        elif has_no_other_reader(node, target, sharing):
            recorded = body.facts.grad_mode(node)
            if recorded or not fake(target).requires_grad:
                memory = storage(fake(node))
                if make_functional(node, recorded):
                    body.edited(node)
                sharing[memory].remove(node)
                sharing.setdefault(storage(fake(node)), []).append(node)


def has_no_other_reader(node: Node, target: Node, sharing: dict[int | None, list[Node]]) -> bool:
    """Whether only ``node`` reads the memory of ``target``, a scalar, from ``node`` on.

    ``sharing``: the nodes by the memory that they share, in order.
    """
    value = fake(target)
    if not isinstance(value, Tensor) or not target.op.startswith("call_") or is_trainable_leaf(value):
        return False
    if not statically_known_true(sym_eq(value.numel(), 1)) or any(before(node, user) for user in target.users):
        return False
    memory = storage(value)
    names = sharing[memory]
    return memory is not None and all(other is target for other in names[: bisect_left(names, node)])  # type: ignore


def is_trainable_leaf(value: Tensor) -> bool:
    """True for a leaf that requires grad, and for a tensor whose ``requires_grad`` autograd refuses to report.

    It refuses for a view of memory that was written in another grad mode.
    """
    try:
        return value.requires_grad and value.is_leaf
    except RuntimeError:
        return True


def make_functional(node: Node, recorded: bool) -> bool:
    """Make a write an op with a result of its own; False where the result would have another dtype or shape."""
    in_place = node.target
    node.target = out_of_place(node)
    args, kwargs = map_arg((node.args, node.kwargs), fake)
    value = fake(node)
    with maybe_get_fake_mode(value), torch.set_grad_enabled(recorded):  # type: ignore[union-attr]
        result = callee(node)(*args, **kwargs)
    if result.dtype == value.dtype and result.shape == value.shape:
        node.meta["example_value"] = result
        return True
    node.target = in_place
    return False

"""Augmented assignments to a subscript, ``z[:, k] += c``, as a write to the whole: ``z.add_(v)``, v zero elsewhere.

| spelling                                              | becomes                                            |
|-------------------------------------------------------|----------------------------------------------------|
| ``z[..., k] += c``, ``-=``, also ``z[..., a:b].add_(c)`` | ``z.add_(v)``, v [V] with c, or -c, in these places |
| ``z[..., k] *= c``, ``/=``                            | ``z.mul_(v)``, v [V] with c, or 1 / c, and else 1    |
| ``z[..., k] = z[..., k] + c`` and so on               | the same                                           |

Exact where nothing else reads the subscript or writes to the tensor in between. v is a vector along one dimension, in
float32 where the tensor is narrower, since the op itself computes in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fusedhead.analysis.body import Body
from fusedhead.graph.aliases import storage
from fusedhead.graph.effects import memory_written
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import every_dimension, fake, name_of
from fusedhead.graph.op_names import PROJECTIONS
from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import static
from fusedhead.ir.builder import Emit
from fusedhead.rules.setitem import column_choice

aten = torch.ops.aten
ADDED, SCALED = ("add_", 0.0), ("mul_", 1.0)
# name of an op -> the write that it becomes, and the function that is applied to its operand first
SUBSCRIPT_OPS: dict[str, tuple[tuple[str, float], str]] = {
    "add": (ADDED, ""), "iadd": (ADDED, ""), "add_": (ADDED, ""),
    "sub": (ADDED, "neg"), "isub": (ADDED, "neg"), "sub_": (ADDED, "neg"),
    "mul": (SCALED, ""), "imul": (SCALED, ""), "mul_": (SCALED, ""),
}  # fmt: skip
WRITES = frozenset({"iadd", "isub", "imul", "add_", "sub_", "mul_"})
ENDS = WRITES | {"setitem"}


@dataclass(eq=False)
class Update:
    """``tensor[index] = tensor[index] op operand``, which ends at ``last``."""

    tensor: Node
    dim: int
    columns: Any  # the index in that dimension; all others are whole
    op: Node
    operand: Any
    view: Node
    last: Node  # the op, where it writes through a view, or the ``setitem``


def run(body: Body) -> None:
    """Replace updates of a part by writes to the whole."""
    graph, facts = body.graph, body.facts
    if not facts.named(ENDS):
        return
    for node in list(graph.nodes):
        update = None if node._erased else update_at(node)
        if update is None or not has_no_other_writer(update, facts):
            continue
        if facts.grad_mode(update.op) or not fake(update.tensor).requires_grad:
            write_whole(graph, update, facts.grad_mode(update.last))


def update_at(node: Node) -> Update | None:
    """The update that ends at a node."""
    if name_of(node) == "setitem":
        tensor, index, op = node.args
        stored = True
    elif name_of(node) in WRITES and not node.users:
        tensor, index, op, stored = None, None, node, False
    else:
        return None
    if not isinstance(op, Node) or name_of(op) not in SUBSCRIPT_OPS or len(op.args) != 2 or op.kwargs:
        return None
    view, operand = op.args
    if not isinstance(view, Node) or name_of(view) != "getitem" or set(view.users) != {op}:
        return None
    if stored and (view.args != (tensor, index) or set(op.users) != {node}):
        return None
    tensor, index = view.args
    if not isinstance(tensor, Node):
        return None
    value = fake(tensor)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not scalar(operand):
        return None
    parts = every_dimension(index, value.ndim)
    at = [d for d, part in enumerate(parts) if part != slice(None)]
    if len(parts) != value.ndim or len(at) != 1 or not (stored or isinstance(parts[at[0]], (int, slice))):
        return None  # an index by a tensor of numbers makes a copy
    return Update(tensor, at[0], parts[at[0]], op, operand, view, node)


def scalar(operand: Any) -> bool:
    if isinstance(operand, Node):
        value = fake(operand)
        return isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()
    return isinstance(operand, (int, float)) and not isinstance(operand, bool)


def has_no_other_writer(update: Update, facts: GraphFacts) -> bool:
    """Whether nothing else writes to the tensor in between, and it comes from a projection."""
    memory = storage(fake(update.tensor))
    through = {update.op, update.last}
    for node in facts.writers(update.view, update.last):
        if node not in through and memory in memory_written(node):
            return False
    reads = isinstance(update.operand, Node) and storage(fake(update.operand)) == memory
    trains = isinstance(update.operand, Node) and fake(update.operand).requires_grad
    return not reads and (not trains or fake(update.tensor).requires_grad) and comes_from_a_projection(update.tensor)


def comes_from_a_projection(tensor: Node) -> bool:
    """Whether a tensor may be logits: it is computed from a product of the same last size."""
    stack, seen, vocab = [tensor], set(), fake(tensor).shape[-1]
    while stack:
        node = stack.pop()
        value = fake(node)
        if node in seen or not isinstance(value, Tensor) or not value.ndim or not node.op.startswith("call_"):
            continue
        if name_of(node) in PROJECTIONS:
            return True
        seen.add(node)
        stack += [s for s in node.all_input_nodes if getattr(fake(s), "ndim", 0) and static(fake(s).shape[-1]) == vocab]
    return False


def write_whole(graph: Graph, update: Update, recorded: bool) -> None:
    """Put one write to the whole tensor in the place of the update."""
    (name, neutral), change = SUBSCRIPT_OPS[name_of(update.op)]
    value, emit = fake(update.tensor), Emit(graph)
    size = static(value.shape[update.dim])
    if size is None:
        return
    compute_dtype = torch.float32 if value.dtype.itemsize < 4 else value.dtype
    try:
        mask = column_choice(update.columns, size, value)
    except Escape:
        return
    with emit.before(update.last, update.last, grad=recorded):
        is_updated = emit.ref(mask)
        if isinstance(update.operand, Node):
            operand = emit.cast(update.operand, compute_dtype)
            operand = emit(aten.neg.default, operand) if change else operand
            whole = emit(aten.full.default, [size], neutral, dtype=compute_dtype, device=value.device)
            vector = emit(aten.where.self, is_updated, operand, whole)
        else:
            number = float(-update.operand if change else update.operand)
            whole = emit(aten.full.default, [size], neutral, dtype=compute_dtype, device=value.device)
            vector = emit(aten.masked_fill.Scalar, whole, is_updated, number)
        if update.dim != value.ndim - 1:
            vector = emit(aten.reshape.default, vector, [-1, *[1] * (value.ndim - 1 - update.dim)])
        with graph.inserting_before(update.last):
            written = graph.call_method(name, (update.tensor, vector))
    written.meta = {k: v for k, v in update.op.meta.items() if k == "stack_trace"} | {"example_value": value}
    for node in dict.fromkeys((update.last, update.op, update.view)):
        graph.erase_node(node)

"""Random abstract values, and what they claim to be, in numbers.

`draw_state` makes some logits: a head, moves of its rows, steps along its vocabulary. `numbers` is the meaning of a
value, by definition and apart from the rewriter: replay the moves on h, multiply, transform.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import HIDDEN, Logits, LogProbs, Probs, ProbTimes, Projection, RowStep, RowVector
from fusedhead.kernels.transform.transform import Step, Transform, apply

aten = torch.ops.aten


@dataclass
class World:
    """Tensors by the nodes that stand for them, and fakes of them."""

    graph: Graph = field(default_factory=Graph)
    real: dict[Node, Tensor] = field(default_factory=dict)
    mode: FakeTensorMode = field(default_factory=FakeTensorMode)

    def plain(self, name: str, tensor: Tensor) -> Plain:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = self.fake(tensor)
        self.real[node] = tensor
        return Plain(node, node.meta["example_value"])

    def fake(self, tensor: Any) -> Any:
        return tree_map(lambda t: self.mode.from_tensor(t) if isinstance(t, Tensor) else t, tensor)


def concrete(ref: Any, world: World) -> Any:
    """The number or tensor of an expression."""
    if isinstance(ref, Plain):
        return concrete(ref.ref, world)
    if isinstance(ref, Expr):
        args, kwargs = concrete(list(ref.args), world), {k: concrete(v, world) for k, v in ref.kwargs.items()}
        return ref.op(*args, **kwargs)
    if isinstance(ref, (list, tuple)):
        return [concrete(r, world) for r in ref]
    return world.real[ref] if isinstance(ref, Node) else ref


def replay(tensor: Tensor, steps: tuple[RowStep, ...], width: int, world: World) -> Tensor:
    for step in steps:
        args = [[width if s is HIDDEN else s for s in a] if isinstance(a, list) else a for a in step.args]
        tensor = step.op(tensor, *concrete(args, world))
    return tensor


@dataclass(frozen=True)
class Flat:
    """Logits as a head sees them: [N, ...] operands and the rows' own shape."""

    h: Tensor  # [N, D]
    w: Tensor  # [V, D]
    cols: Tensor  # [C, V]
    rows: Tensor  # [R, N]
    sizes: list[int]


def flat(logits: Logits, world: World) -> Flat:
    """The operands of the head that the value claims."""
    width = logits.head.weight.val.shape[1]
    hidden = concrete(logits.head.hidden, world).float()
    weight = concrete(logits.head.weight, world).float()
    if logits.vocab is not None:
        weight = weight[logits.vocab[0] : logits.vocab[1]]
    moved = replay(hidden, logits.row_steps, width, world).movedim(logits.class_dim, -1)
    sizes = list(moved.shape[:-1])
    h = moved.reshape(-1, width)
    cols = [concrete(c, world).float() for c in logits.cols]
    rows = [row_vector(hidden, logits, r, world) for r in logits.rows]
    return Flat(
        h,
        weight,
        torch.stack(cols) if cols else h.new_empty(0, 0),
        torch.stack(rows) if rows else h.new_empty(0, 0),
        sizes,
    )


def row_vector(hidden: Tensor, logits: Logits, vector: RowVector, world: World) -> Tensor:
    sizes = list(vector.shape_of.shape)
    sizes[vector.class_dim] = 1
    spread = concrete(vector.value, world).float().expand(sizes)
    moved = replay(spread, logits.row_steps[vector.after :], 1, world)
    return moved.movedim(logits.class_dim, -1).reshape(-1)


def numbers(value: Any, world: World) -> Tensor:
    """What a followed value claims to be, in its own shape."""
    if isinstance(value, Logits):
        head = flat(value, world)
        z = apply(Transform(value.steps).smooth, head.h @ head.w.T, head.cols, head.rows)
        return z.reshape(*head.sizes, -1).movedim(-1, value.class_dim)
    z, d = numbers(value.of, world), value.of.class_dim
    meaning = {
        LogProbs: lambda: z.log_softmax(d),
        Probs: lambda: z.softmax(d),
        ProbTimes: lambda: (
            (z.softmax(d) if value.weighted else 1) * (z.log_softmax(d) if value.log else z) ** value.power
        ),
    }
    return value.factor * meaning[type(value)]()


UNARY = ("tanh", "sigmoid")
CONSTANTS = (0.5, -1.5, 2.0)


@st.composite
def draw_state(draw: Any) -> tuple[World, Logits]:
    """Logits of ragged shape after a few moves and steps, in a world where their operands have numbers."""
    world = World()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    sizes = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    vocab, width = draw(st.integers(2, 5)), draw(st.integers(1, 4))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden, weight = world.plain("h", random(*sizes, width)), world.plain("w", random(vocab, width))
    node = world.graph.placeholder("projection")
    z = Logits(Projection(node, hidden, weight, torch.float32), world.fake(random(*sizes, vocab)), len(sizes))
    for kind in draw(st.lists(st.sampled_from(("class", "rows", "col", "row", "constant", "unary")), max_size=4)):
        shape, rank = list(z.val.shape), z.val.ndim
        if kind == "class":  # the class dimension moves
            to = draw(st.integers(0, rank - 1))
            step = RowStep(aten.movedim.int, (z.class_dim, to), keeps_order=True)
            shape.insert(to, shape.pop(z.class_dim))
            z = Logits(z.head, world.fake(random(*shape)), to, (*z.row_steps, step), z.steps, z.cols, z.rows)
        elif kind == "rows" and rank > 1:  # rows are picked, some twice
            at = draw(st.sampled_from([d for d in range(rank) if d != z.class_dim]))
            picked = torch.randint(0, shape[at], (draw(st.integers(1, 3)),), generator=generator)
            shape[at] = len(picked)
            step = RowStep(aten.index_select.default, (at, world.plain(f"i{len(world.real)}", picked)))
            z = Logits(z.head, world.fake(random(*shape)), z.class_dim, (*z.row_steps, step), z.steps, z.cols, z.rows)
        elif kind == "col":
            op, column = draw(st.sampled_from(("addcol", "mulcol", "setcol", "dropcol"))), random(vocab)
            if op == "setcol":
                column[column < 0.5] = torch.nan
            elif op == "dropcol":
                column = (column > 1.0).float()
            z = z.step(z.val, Step(op, len(z.cols)), cols=(*z.cols, world.plain(f"col{len(z.cols)}", column)))
        elif kind == "row":
            shape[z.class_dim] = 1
            vector = RowVector(world.plain(f"row{len(z.rows)}", random(*shape)), len(z.row_steps), z.val, z.class_dim)
            z = z.step(z.val, Step(draw(st.sampled_from(("addrow", "mulrow"))), len(z.rows)), rows=(*z.rows, vector))
        elif kind == "constant":
            z = z.step(z.val, Step(draw(st.sampled_from(("mul", "add"))), draw(st.sampled_from(CONSTANTS))))
        elif kind == "unary":
            z = z.step(z.val, Step(draw(st.sampled_from(UNARY))))
    return world, z

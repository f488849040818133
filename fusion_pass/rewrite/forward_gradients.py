"""Gradients in the forward sweep, for a loss that is linear in the head's statistics.

``head_stats`` allows any per-row upstream gradient, but builds every window of logits twice. When the graph reduces the
statistics to one scalar with coefficients that do not depend on them (mean, sum / num_items, mask / mask.sum(), class
weights ...), the upstream gradient of the statistics is the scalar's, times numbers known before the sweep. Then
``head_loss`` computes the gradients in the same sweep, and ``head_rows_loss`` replaces ``head_rows`` for the results of
a token program.

`loss_tail` finds the nodes between the statistics and the scalar, `tail_gradient` proves that they are linear. The
tail itself stays in the graph, so the loss keeps the program's own treatment of NaN, ignored labels and rounding.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.node import map_arg

from fusedhead.analysis.body import Body
from fusedhead.analysis.cost import price_of_statistics, price_of_token_program
from fusedhead.analysis.reasons import NotInForward
from fusedhead.compat import HigherOrderOperator
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.motion import hoist, overwritten_between
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.reasons import Escape, Refusal, refuse
from fusedhead.ir.builder import Emit, named
from fusedhead.kernels.contract import COMPANIONS, LINEAR_STATS, LOSS_OUTPUTS, STATS
from fusedhead.rewrite import loss_scale, shard_sweeps
from fusedhead.rewrite.loss_tail import (
    depends_on,
    differentiable,
    first_use,
    gradient_transparent,
    name_index,
    needs_of,
    squares_of_lse,
    tails,
    writes_into,
)
from fusedhead.rewrite.tail_gradient import coefficients, dependent, needed, shape_only

aten = torch.ops.aten
SHARDS = torch.ops.fusedhead.shard_stats.default
TRIES = 4  # scalars tried: the total loss, and its values before weights or terms were added
TIE = LOSS_OUTPUTS.index("tie")
# outputs without a gradient: `head_stats` -> `head_loss`
CONSTANT = {STATS.index(name): LOSS_OUTPUTS.index(name) for name in COMPANIONS}


def run(body: Body) -> None:
    """Compute gradients of the emitted calls in the forward sweep where their loss is linear; record the price."""
    budget, float8 = body.options.budget, body.options.gradients == "float8"
    for emitted in sorted(body.emitted, key=lambda emitted: emitted.token_by_token):
        if emitted.token_by_token:
            for call in emitted.calls:
                price = price_of_token_program(call, budget, float8)  # reads the call, which an upgrade replaces
                emitted.prices.append(price(body.recomputes or upgrade_rows(call, body.facts)))
        else:
            price = price_of_statistics(emitted.calls[0], budget, float8)
            emitted.prices.append(price(body.recomputes or upgrade(*emitted.calls, facts=body.facts)))
    if float8:
        allow_float8(body)


def allow_float8(body: Body) -> None:
    """Let the planner choose float8 products for the gradients that are computed in the forward sweep."""
    for call in body.graph.find_nodes(op="call_function", target=torch.ops.fusedhead.head_loss.default):
        call.kwargs = {"float8": True}
        body.edited(call)


class CallFamily(NamedTuple):
    """The differences between the two pairs of ops."""

    squares: Callable[[Sequence[Node], Sequence[Node]], list[Node]]  # squares of statistics, which count as statistics
    sized: Callable[[Node], Sequence[Node]]  # a call's tensors, hidden states first, whose sizes are known
    replace: Callable[[Emit, Node, dict[Node, Node], Sequence[Node]], Sequence[Node]]  # -> what ties the loss to it


def upgrade_rows(call: Node, facts: GraphFacts) -> Refusal | None:
    """Replace a ``head_rows`` call by ``head_rows_loss`` where the tail is linear. Returns None when done, else the
    reason.
    """
    tensors: Any = call.args[0]
    if not any(map(differentiable, tensors)) or not any(map(differentiable, call.users)):
        return refuse(NotInForward.NO_GRADIENT)
    if any(differentiable(t) and fake(t).dtype == torch.float16 for t in tensors):
        return refuse(NotInForward.FLOAT16)
    return first_tail([call], [user for user in call.users if user.users and differentiable(user)], ROWS_CALLS, facts)


def upgrade(*calls: Node, facts: GraphFacts) -> Refusal | None:
    """Replace ``head_stats`` calls whose results meet by ``head_loss`` where the tail is linear.

    Returns None when done, else the reason why the gradients are recomputed.
    """
    for call in calls:
        if not any(needs_of(call)) or not any(map(differentiable, call.users)):
            return refuse(NotInForward.NO_GRADIENT)
        why = shard_sweeps.not_in_one_sweep(call) if call.target is SHARDS else None
        if why is not None:
            return why
        if loss_scale.vanishes(call):
            return refuse(NotInForward.FLOAT16)
        nonlinear = sorted(STATS.index(name) for name in str(call.args[7]).split(",") if name not in LINEAR_STATS)
        if not CONSTANT.keys() >= set(nonlinear):
            named = ", ".join(sorted(STATS[at] for at in nonlinear if at not in CONSTANT))
            return refuse(NotInForward.OTHER_STATISTICS, names=named)
    statistics = [user for call in calls for user in call.users if user.users and name_index(user) not in CONSTANT]
    return first_tail(calls, statistics, GAIN_CALLS if loss_scale.is_float16(calls[0]) else STATISTICS_CALLS, facts)


def first_tail(
    calls: Sequence[Node], statistics: Sequence[Node], family: CallFamily, facts: GraphFacts
) -> Refusal | None:
    reason: Refusal | None = refuse(NotInForward.NO_SCALAR)
    for tail in islice(tails(statistics), TRIES):
        reason = try_tail(calls, statistics, tail, family, facts)
        if not reason:
            break
    return reason


def try_tail(
    calls: Sequence[Node], statistics: Sequence[Node], tail: Sequence[Node], family: CallFamily, facts: GraphFacts
) -> Refusal | None:
    """`upgrade` with one tail. Returns None when done."""
    impure = next((node for call in calls if (node := writes_into(call, tail[-1], facts)) is not None), None)
    if impure is not None:
        return refuse(NotInForward.WRITES_LOSS, node=impure, name=name_of(impure))
    unknown = next((node for node in tail if isinstance(node.target, HigherOrderOperator)), None)
    if unknown is not None:
        return refuse(NotInForward.HIGHER_ORDER, node=unknown, name=name_of(unknown))
    inside = {*statistics, *tail}
    transparent = gradient_transparent(tail, statistics)
    read = (source for node in tail if node not in transparent for source in node.all_input_nodes)
    outside = list(dict.fromkeys(source for source in read if source not in inside))
    squares = family.squares(statistics, tail) if len(calls) == 1 else []
    program = coefficients(statistics, squares, tail, outside, transparent)
    if isinstance(program, Refusal):
        return program
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    free = len(statistics) + len(squares)
    reads = dependent(program.graph, free)
    read_nodes = {n for node in needed(program.graph, reads) for n in node.all_input_nodes}
    operands = [other for other, n in zip(outside, placeholders[free:]) if n in read_nodes]
    blocked = next((node for call in calls if (node := depends_on(operands, call)) is not None), None)
    if blocked is not None:
        return refuse(NotInForward.DEPENDS_ON_RESULTS, node=blocked, name=blocked.name)
    anchor = first_use([user for call in calls for user in call.users])
    if overwritten_between(operands, anchor, tail[-1], facts):
        return refuse(NotInForward.OPERAND_CHANGED)
    forbidden = hoist(operands, anchor, facts)
    gradient = TailGradient(statistics, squares, outside, program)
    return forbidden or replace_with_losses(calls, gradient, anchor, tail[-1], family)


class TailGradient(NamedTuple):
    """The gradient of a linear tail: ``program`` computes it for ``statistics`` and ``squares`` from ``operands``."""

    statistics: Sequence[Node]
    squares: Sequence[Node]
    operands: Sequence[Node]
    program: GraphModule


def replace_with_losses(
    calls: Sequence[Node], gradient: TailGradient, anchor: Node, scalar: Node, family: CallFamily
) -> Refusal | None:
    """Replace each call by the op that takes coefficients. Returns None when done."""
    statistics, squares, outside, program = gradient
    emit = Emit(anchor.graph)
    sized = family.sized(calls[0])
    with emit.before(anchor, calls[0], grad=True):
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        env: dict[Node, Any] = dict(zip(placeholders, [*statistics, *squares, *outside]))
        reads = dependent(program.graph, len(statistics) + len(squares))
        for node in needed(program.graph, reads):
            if shape_only(node) and node.args[0] in reads:
                try:
                    env[node] = shaped_like(emit, node, env, sized)
                except UnknownSize as unknown:
                    for node_made in reversed(emit.nodes):
                        node_made.graph.erase_node(node_made)
                    return unknown.refusal
            else:
                args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = emit(node.target, *args, **kwargs)
        gradients: Any = program.graph.output_node().args[0]
        results = [named(emit(aten.detach.default, env[r]), "coefficients") for r in gradients]
        square = [emit(aten.reshape.default, r, [-1]) for r in results[len(statistics) :]]
        ties: list[Node] = []
        for call in calls:
            results_of = {s: r for s, r in zip(statistics, results) if s.args[0] is call}
            ties += family.replace(emit, call, results_of, square)
    tie_to(scalar, ties, emit)
    return None


def tie_to(scalar: Node, ties: Sequence[Node], emit: Emit) -> None:
    """Add each head's zero ``tie`` output to the loss, so that autograd hands d(loss) straight to the head."""
    if ties:
        with emit.before(scalar.next, scalar, grad=True):
            tie = functools.reduce(lambda a, b: emit(aten.add.Tensor, a, b), ties)
            tied = named(emit(aten.add.Tensor, scalar, emit.cast(tie, fake(scalar).dtype)), "tied")
        scalar.replace_all_uses_with(tied, delete_user_cb=lambda user: user is not tied)


def replace_call(emit: Emit, call: Node, coefficients: dict[Node, Node], squares: Sequence[Node]) -> list[Node]:
    """Replace a ``head_stats`` by ``head_loss``, or a ``shard_stats`` by ``shard_loss``.

    ``coefficients``: of its results, which become constants.
    """
    tensors: Any = call.args[:6]
    by_index, inverse = loss_scale.scaled_coefficients(emit, call, {name_index(s): r for s, r in coefficients.items()})
    empty = named(emit(aten.new_empty.default, tensors[0], [0], dtype=torch.float32), "no_coefficients")
    c = [by_index.get(i, empty) for i in range(len(LINEAR_STATS))]
    total = functools.reduce(lambda a, b: emit(aten.add.Tensor, a, b), squares) if squares else empty
    if call.target is SHARDS:
        loss = shard_sweeps.loss_call(emit, call, [*c, total])
    else:
        op = torch.ops.fusedhead.head_loss.default
        loss = emit(op, *tensors, *c, total, *call.args[6:9], *needs_of(call))
    read = {s: emit(aten.detach.default, emit(operator.getitem, loss, name_index(s))) for s in coefficients}
    tie = loss_scale.divided(emit, emit(operator.getitem, loss, TIE), inverse)
    for statistic, node in read.items():
        statistic.replace_all_uses_with(node)
    for node in list(call.users):
        if node.users:
            constant = emit(operator.getitem, loss, CONSTANT[name_index(node)])
            node.replace_all_uses_with(named(constant, STATS[name_index(node)]))
        call.graph.erase_node(node)
    call.graph.erase_node(call)
    named(loss, "head")
    for node in read.values():
        named(node, LINEAR_STATS[name_index(node.args[0])])  # type: ignore[arg-type]
    return [named(tie, "tie")]


def replace_rows(emit: Emit, call: Node, coefficients: dict[Node, Node], squares: Sequence[Node]) -> list[Node]:
    """Replace a ``head_rows`` by ``head_rows_loss``. ``coefficients``: of its results."""
    tensors: Any
    tensors, program, memory = call.args
    by_index = {name_index(s): r for s, r in coefficients.items()}
    absent = emit(aten.new_empty.default, tensors[0], [], dtype=torch.float32)  # 0-d, unlike every result
    c = [by_index.get(i, absent) for i in range(len(fake(call)))]
    op = torch.ops.fusedhead.head_rows_loss.default
    loss = named(emit(op, tensors, c, program, memory, [differentiable(t) for t in tensors]), "head_rows")
    for result in list(call.users):
        if result.users:
            result.replace_all_uses_with(emit(operator.getitem, loss, name_index(result)))
        call.graph.erase_node(result)
    call.graph.erase_node(call)
    return []


def no_squares(statistics: Sequence[Node], tail: Sequence[Node]) -> list[Node]:
    return []


STATISTICS_CALLS = CallFamily(squares_of_lse, lambda call: (call.args[0], call.args[2]), replace_call)  # type: ignore[arg-type, return-value]
GAIN_CALLS = STATISTICS_CALLS._replace(squares=no_squares)  # a gain would have to know the lse
ROWS_CALLS = CallFamily(no_squares, lambda call: call.args[0], replace_rows)  # type: ignore[return-value, arg-type]


class UnknownSize(Escape):
    """The coefficients need a symbolic size that no tensor before the sweep has."""


def shaped_like(emit: Emit, node: Node, env: dict[Node, Any], sized: Sequence[Node]) -> Any:
    """A shape-only op on a statistic that does not exist yet: the sizes are taken from h [N, D], y [N, K] ...

    Where h holds the rows of several groups, a statistic may have the sizes of one of them.
    """
    h = sized[0]
    pieces = h.args[0] if h.target is aten.cat.default else ()
    like = node.args[0].meta["val"]  # type: ignore[union-attr]

    def size(d: int) -> Any:
        for source in (*sized, *pieces):  # type: ignore[misc]
            for at, size_known in enumerate(fake(source).shape):
                if statically_known_true(sym_eq(size_known, like.shape[d])):
                    return size_known if isinstance(size_known, int) else emit(aten.sym_size.int, source, at)
        if not isinstance(like.shape[d], int):
            raise UnknownSize(NotInForward.SYMBOLIC_SIZE)
        return like.shape[d]

    if name_of(node) == "sym_size":
        return size(int(node.args[1]))  # type: ignore[arg-type]
    args, kwargs = map_arg((node.args[1:], node.kwargs), env.__getitem__)
    stand_in = emit(aten.new_empty.default, h, [size(d) for d in range(like.ndim)], dtype=like.dtype)
    return emit(node.target, stand_in, *args, **kwargs)

"""Proving that a loss is linear in a head's statistics, and then taking the gradients in the forward sweep.

``head_stats`` allows any per-row upstream gradient, at the price of building every window of logits twice.
When the graph reduces the statistics to one scalar with coefficients that do not depend on them (mean,
sum / num_items, mask / mask.sum(), class weights ...), the upstream gradient of the statistics is that
scalar's own, times numbers known before the sweep: then ``head_loss`` computes the gradients in the same sweep.

The proof needs no rule per op. The *tail*, the nodes between the statistics and the scalar, is differentiated
symbolically (``make_fx`` of its gradient); the tail is linear exactly when the traced gradient does not read the
statistics. What the trace computes then *is* the coefficients. The tail itself stays in the graph, so the
loss keeps the program's own treatment of NaN, ignored labels and rounding.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.node import map_arg

from fusedhead.aliases import written
from fusedhead.emit import Emit, named
from fusedhead.hoisting import hoist, overwritten, random
from fusedhead.interpret import grad_modes
from fusedhead.kernels.contract import STATS
from fusedhead.read import callee, fake, name_of

aten = torch.ops.aten
LINEAR_STATS = ("lse", "picked", "sum")
TRIES = 4  # scalars looked at before giving up: the total loss, and what it was before weights or terms joined


def differentiable(node: Node) -> bool:
    value = fake(node)
    return isinstance(value, Tensor) and value.requires_grad


def tails(statistics: Sequence[Node]) -> list[list[Node]]:
    """Tails to try: the differentiable nodes from the statistics to a scalar they all meet in, longest first.

    The longest is the best: the further down the scalar, the likelier its upstream gradient is exactly 1.
    """
    reached, tail = set(statistics), []
    for node in statistics[0].graph.nodes:
        fresh = node.op.startswith("call_") and node not in reached
        if fresh and any(source in reached for source in node.all_input_nodes) and differentiable(node):
            reached.add(node)
            tail.append(node)
    found = []
    for end in reversed(range(len(tail))):
        scalar, inside = tail[end], ancestors(tail[end], tail)
        single = statically_known_true(sym_eq(fake(scalar).numel(), 1))
        if single and all(closed(n, {*inside, scalar}, scalar) for n in [*statistics, *inside]):
            found.append([*inside, scalar])
    return found


def ancestors(node: Node, among: Sequence[Node]) -> list[Node]:
    """The nodes of ``among`` that ``node`` is computed from, in order."""
    allowed, found, stack = set(among), set(), list(node.all_input_nodes)
    while stack:
        source = stack.pop()
        if source in allowed and source not in found:
            found.add(source)
            stack.extend(source.all_input_nodes)
    return [n for n in among if n in found]


def closed(node: Node, inside: set[Node], scalar: Node) -> bool:
    """Whether every gradient through ``node`` comes from inside the tail."""
    return node is scalar or all(user in inside or (user.op.startswith("call_") and not differentiable(user))
                                 for user in node.users)  # fmt: skip


def squares_of_lse(statistics: Sequence[Node], tail: Sequence[Node]) -> list[Node]:
    """The nodes of the tail that are lse², element by element (a z-loss): statistics of their own to `head_loss`."""
    same = {node for node in statistics if name_index(node) == 0}
    found = []
    for node in tail:
        name, args = name_of(node), node.args
        if name in ("view", "reshape", "flatten") and args[0] in same:
            same.add(node)
        squared = (name in ("pow", "__pow__") and args[1:] == (2,)) or name == "square"
        squared |= name in ("mul", "multiply") and len(args) == 2 and args[0] is args[1]
        if squared and args[0] in same:
            found.append(node)
    return found


def coefficients(
    statistics: Sequence[Node], squares: Sequence[Node], tail: Sequence[Node], others: Sequence[Node]
) -> GraphModule | str:
    """∂ scalar / ∂ (statistics, squares) as a graph of ``others`` alone, or a sentence if the tail is not linear."""
    free = [*statistics, *squares]

    def gradient(*values: Any) -> list[Tensor]:
        env = dict(zip([*free, *others], values))
        for node in free:
            env[node] = env[node].detach().requires_grad_()
        leaves = [env[node] for node in free]
        with torch.enable_grad():
            for node in tail:
                if node not in env:
                    args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                    env[node] = callee(node)(*args, **kwargs)
            total = env[tail[-1]]
            one = torch.ones(total.shape, dtype=total.dtype, device=total.device)
            grads = torch.autograd.grad(total, leaves, one, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves)]

    values = [fake(node) for node in [*free, *others]]
    values = [v.detach() if isinstance(v, Tensor) else v for v in values]
    mode = maybe_get_fake_mode(fake(statistics[0]))
    with torch.autocast(fake(statistics[0]).device.type, enabled=False), mode or nullcontext():
        try:
            program = make_fx(gradient)(*values)
        except Exception as error:
            return f"what is made of the per-row results cannot be differentiated alone ({type(error).__name__})"
    program.graph.eliminate_dead_code()
    reads = dependent(program.graph, len(free))
    for node in needed(program.graph, reads):
        if node in reads:
            return f"it is not linear in the per-row results ({name_of(node)} of them enters the gradient)"
        if random(node):
            return f"{name_of(node)} draws random numbers, and a gradient would draw others"
    return program


def dependent(graph: Graph, statistics: int) -> set[Node]:
    """The nodes whose numbers, not only shapes, are computed from the first ``statistics`` placeholders."""
    reached = set([n for n in graph.nodes if n.op == "placeholder"][:statistics])
    for node in graph.nodes:
        if not shape_only(node) and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def needed(graph: Graph, reads: set[Node]) -> list[Node]:
    """The calls that the graph's outputs need, in order, where a shape needs nothing of the statistics."""
    stack, found = list(output_of(graph).all_input_nodes), set()
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack.extend(s for s in node.all_input_nodes if not (shape_only(node) and s in reads))
    return [node for node in graph.nodes if node in found and (node.op == "call_function" or node in reads)]


SHAPE_ONLY = frozenset({"sym_size", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_empty", "new_ones"})


def shape_only(node: Node) -> bool:
    """A use of a tensor that reads its shape, not its numbers."""
    return name_of(node) in SHAPE_ONLY


def output_of(graph: Graph) -> Node:
    return next(node for node in graph.nodes if node.op == "output")


def upgrade(call: Node) -> str:
    """Turn a ``head_stats`` call into ``head_loss`` where the tail allows it.

    Returns "" when done, else the sentence that says why the gradients are recomputed instead.
    """
    h, w, _, cols, rows, _ = call.args[:6]
    needs = [differentiable(n) for n in (h, w, cols, rows)]  # type: ignore[arg-type]
    if not any(needs) or not any(map(differentiable, call.users)):
        return "no gradient is needed"
    if fake(h).dtype == torch.float16:  # type: ignore[arg-type]
        return "in float16 a gradient taken before the loss scale is known would underflow"
    asked = str(call.args[7]).split(",")
    if set(asked) - set(LINEAR_STATS):
        return f"{', '.join(sorted(set(asked) - set(LINEAR_STATS)))} is asked for as well"
    statistics = [user for user in call.users if user.users]
    reason = "the per-row results are not reduced to one scalar"
    for tail in tails(statistics)[:TRIES]:
        reason = try_tail(call, statistics, tail, needs)
        if not reason:
            break
    return reason


def try_tail(call: Node, statistics: Sequence[Node], tail: Sequence[Node], needs: list[bool]) -> str:
    """`upgrade` with one tail: "" when done."""
    impure = writes_into(call, tail[-1])
    if impure is not None:
        return f"{name_of(impure)} works in place on the loss"
    unread = next((node for node in tail if isinstance(node.target, torch._ops.HigherOrderOperator)), None)
    if unread is not None:
        return f"{name_of(unread)} takes the loss, and what it does with it is not read"
    inside = {*statistics, *tail}
    others = list(dict.fromkeys(s for node in tail for s in node.all_input_nodes if s not in inside))
    squares = squares_of_lse(statistics, tail)
    program = coefficients(statistics, squares, tail, others)
    if isinstance(program, str):
        return program
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    free = len(statistics) + len(squares)
    reads = dependent(program.graph, free)
    used = {n for node in needed(program.graph, reads) for n in node.all_input_nodes}
    operands = [other for other, n in zip(others, placeholders[free:]) if n in used]
    blocked = depends_on(operands, call)
    if blocked is not None:
        return f"{blocked.name} depends on the per-row results themselves"
    anchor = first_use(call.graph, statistics)
    if overwritten(operands, anchor, tail[-1]):
        return "an operand of the loss is changed in place after the head"
    forbidden = hoist(call.graph, operands, anchor, grad_modes(call.graph))
    if not forbidden:
        replace(call, statistics, squares, others, program, anchor, needs)
    return forbidden


def depends_on(nodes: Sequence[Node], call: Node) -> Node | None:
    """The first of ``nodes`` that is computed from the call's results."""
    reached = computed_from(call)
    return next((node for node in nodes if node in reached), None)


def computed_from(start: Node) -> set[Node]:
    """``start`` and every node that reads it, directly or not."""
    reached = {start}
    for node in start.graph.nodes:
        if any(s in reached for s in node.all_input_nodes):
            reached.add(node)
    return reached


def writes_into(call: Node, scalar: Node) -> Node | None:
    """The first node that writes to something between the head and the scalar.

    By names, not by memory: the fake values of old nodes do not know yet that they are views of new ones.
    """
    between = computed_from(call) - computed_from(scalar)
    return next((node for node in call.graph.nodes if any(target in between for target in written(node))), None)


def first_use(graph: Graph, statistics: Sequence[Node]) -> Node:
    users = {user for node in statistics for user in node.users}
    return next(node for node in graph.nodes if node in users)


def replace(
    call: Node,
    statistics: Sequence[Node],
    squares: Sequence[Node],
    others: Sequence[Node],
    program: GraphModule,
    anchor: Node,
    needs: list[bool],
) -> None:
    """Put ``head_loss``, with its coefficients, in the place of ``head_stats``."""
    emit = Emit(call.graph)
    tensors: Any = call.args[:6]
    transform, stats, memory = call.args[6:]
    with emit.before(anchor, call, grad=True):
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        env: dict[Node, Any] = dict(zip(placeholders, [*statistics, *squares, *others]))
        reads = dependent(program.graph, len(statistics) + len(squares))
        for node in needed(program.graph, reads):
            if shape_only(node) and node.args[0] in reads:
                env[node] = shaped_like(emit, node, env, tensors[0], tensors[2])
            else:
                args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = emit(node.target, *args, **kwargs)
        gradients: Any = output_of(program.graph).args[0]
        results = [named(emit(aten.detach.default, env[r]), "coefficients") for r in gradients]
        given = {name_index(s): r for s, r in zip(statistics, results)}
        empty = named(emit(aten.new_empty.default, tensors[0], [0], dtype=torch.float32), "no_coefficients")
        c = [given.get(i, empty) for i in range(len(LINEAR_STATS))]
        square = [emit(aten.reshape.default, r, [-1]) for r in results[len(statistics) :]]
        total = functools.reduce(lambda a, b: emit(aten.add.Tensor, a, b), square) if square else empty
        op = torch.ops.fusedhead.head_loss.default
        loss = emit(op, *tensors, *c, total, transform, stats, memory, *needs)
        read = {s: emit(operator.getitem, loss, name_index(s)) for s in statistics}
    for statistic, node in read.items():
        statistic.replace_all_uses_with(node)
    for node in [*call.users, call]:
        call.graph.erase_node(node)
    named(loss, "head")
    for node in read.values():
        named(node, LINEAR_STATS[name_index(node)])


def name_index(statistic: Node) -> int:
    """Which output of ``head_stats`` a getitem reads; lse, picked, sum have the same place in ``head_loss``."""
    assert STATS[:3] == LINEAR_STATS
    return int(statistic.args[1])  # type: ignore[arg-type]


def shaped_like(emit: Emit, node: Node, env: dict[Node, Any], h: Node, y: Node) -> Any:
    """A shape-only op on a statistic, before the statistic exists: its sizes are those of h [N, D] and y [N, K]."""
    like = node.args[0].meta["val"]  # type: ignore[union-attr]

    def size(d: int) -> Any:
        for source in (h, y):
            for at, known in enumerate(fake(source).shape):
                if statically_known_true(sym_eq(known, like.shape[d])):
                    return known if isinstance(known, int) else emit(aten.sym_size.int, source, at)
        assert isinstance(like.shape[d], int), "a symbolic size of the losses that is not the number of tokens"
        return like.shape[d]

    if name_of(node) == "sym_size":
        return size(int(node.args[1]))  # type: ignore[arg-type]
    args, kwargs = map_arg((node.args[1:], node.kwargs), env.__getitem__)
    stand_in = emit(aten.new_empty.default, h, [size(d) for d in range(like.ndim)], dtype=like.dtype)
    return emit(node.target, stand_in, *args, **kwargs)

"""Reading one spelled program by the rules, and holding what they claim against what torch computes.

This file knows how to compare; which programs and which logits is the test's matter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from rules.states import World, concrete, flat, numbers
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from fusedhead.analysis import evaluator
from fusedhead.analysis.evaluator import trace_value
from fusedhead.graph.nodes import callee, name_of
from fusedhead.graph.op_names import PROJECTIONS as PROJECTION_NAMES
from fusedhead.graph.reasons import Escape
from fusedhead.ir.builder import Emit
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import LOGITS_LIKE, logits_of
from fusedhead.ir.terminal import Statistics, Terminal
from fusedhead.ir.tokenwise import HeadInput, ProgramResult, TokenInput, TokenValue
from fusedhead.kernels import reference
from fusedhead.kernels.contract import Head
from fusedhead.kernels.transform.transform import Transform, apply
from fusedhead.rules import RULES
from fusedhead.rules.table import Context
from fusedhead.rules.tokenwise import dispatch as tokenwise


def computed(node: Any, world: World) -> Any:
    """The number of an emitted node."""
    if not isinstance(node, Node):
        return node
    if node not in world.real:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: computed(n, world))
        world.real[node] = callee(node)(*args, **kwargs)
    return world.real[node]


def result_of(terminal: Terminal, world: World) -> Tensor:
    """What the nodes that a terminal emits compute, from the statistics taken by their definition."""
    emit, head = Emit(world.graph), flat(terminal.logits, world)
    anchor = world.graph.call_function(len, ())
    with emit.before(anchor, anchor, grad=False):
        y = computed(terminal.labels(emit), world) if terminal.labels else torch.empty(len(head.h), 0).long()
        u = concrete(terminal.weights, world).float() if terminal.weights is not None else head.h.new_empty(0)
        stats = reference.row_stats(Head(head.h, head.w, y, head.cols, head.rows, u, Transform(terminal.logits.steps)))
        nodes = {
            name: world.plain(name, getattr(stats, name)).ref
            for name in stats._fields
            if name in (*terminal.want, "lse")
        }
        lse, picked, total = nodes.pop("lse"), nodes.pop("picked", None), nodes.pop("sum", None)
        inputs = Statistics(lse, picked, total, lambda: list(head.sizes), nodes)
        return computed(terminal.result(emit, inputs), world)


def token_by_token(expr: Any, world: World) -> Any:
    """The numbers [N, ...] of a rowwise expression, all tokens at once."""
    if isinstance(expr, HeadInput):
        logits = expr.logits
        head = flat(logits, world)
        z = apply(Transform(logits.steps), head.h @ head.w.T, head.cols, head.rows, decide=True)
        return z.to(logits.val.dtype)
    if isinstance(expr, TokenInput):
        return concrete(expr.value, world)
    if isinstance(expr, Expr):
        args, kwargs = tree_map(lambda x: token_by_token(x, world), (expr.args, expr.kwargs))
        return expr.op(*args, **kwargs)
    return expr


def in_shape(value: TokenValue, world: World) -> Tensor:
    """A rowwise value in the program's own dimensions."""
    order = [d for d, t in enumerate(value.tail) if not t] + [d for d, t in enumerate(value.tail) if t]
    rows = token_by_token(value.expr, world)
    tail = [value.val.shape[d] for d, t in enumerate(value.tail) if t]
    assert list(rows.shape[1:]) == tail, "the tail is not what the expression gives"
    moved = rows.reshape([value.val.shape[d] for d in order])
    return moved.permute([order.index(d) for d in range(len(order))])


def expressed(value: Any, world: World) -> Any:
    """The number of an expression of the graph that reads results of a token program."""
    if isinstance(value, ProgramResult):
        return in_shape(value.value, world)
    if isinstance(value, Plain):
        return expressed(value.ref, world)
    if isinstance(value, Expr):
        args, kwargs = tree_map(lambda x: expressed(x, world), (value.args, value.kwargs))
        return value.op(*args, **kwargs)
    return concrete(value, world)


def claimed(value: Any, world: World) -> Tensor:
    """The tensor that a rule claims its op returns, after checking what it says of its shape."""
    if isinstance(value, Terminal):
        return result_of(value, world)
    if isinstance(value, TokenValue):
        return in_shape(value, world)
    if isinstance(value, Plain):
        return expressed(value, world)
    logits = logits_of(value)
    first, last = logits.vocab or (0, logits.head.weight.val.shape[0])
    assert value.val.shape[logits.class_dim] == last - first, "the class dimension is not as long as the vocabulary"
    return numbers(value, world)


def agree(claim: Tensor, real: Tensor) -> None:
    assert list(claim.shape) == list(real.shape)
    low = real.dtype in (torch.bfloat16, torch.float16)
    tolerance = {"rtol": 0.02, "atol": 0.02} if low else {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(claim.double(), real.double(), equal_nan=True, **tolerance)


def read(text: str, operands: dict[str, Plain], world: World, logits: Any = None) -> tuple[set[Any], str]:
    """Follow the logits through a program and check every claim on the way.

    Returns the overloads whose rules were asked, and "" or the sentence of the escape that ended it.
    """
    named = [name for name in operands if name in text]
    scope = {"torch": torch, "F": torch.nn.functional}
    program = torch.fx.symbolic_trace(eval(f"lambda {', '.join(named)}: {text}", scope))
    asked: set[Any] = set()
    values: dict[Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            world.real[node] = concrete(operands[node.name], world)
            if node.name == "z":
                values[node] = logits
        elif node.op.startswith("call_"):
            args, kwargs = map_arg((node.args, node.kwargs), world.real.__getitem__)
            world.real[node] = callee(node)(*args, **kwargs)
        elif node.op == "get_attr":
            world.real[node] = getattr(program, node.target)
        else:
            break
        node.meta["example_value"] = world.fake(world.real[node])
        sources = [v for s in node.all_input_nodes for v in tree_leaves(values.get(s))]
        followed = any(isinstance(v, (TokenValue, *LOGITS_LIKE)) for v in sources)
        if not node.op.startswith("call_") or not (followed or name_of(node) in PROJECTION_NAMES):
            continue
        try:
            value = spied(node, values, asked)
        except Escape as escape:
            return asked, str(escape)
        real = world.real[node]
        if isinstance(value, (list, tuple)):
            for one, each in zip(value, real):
                agree(claimed(one, world), each)
            values[node] = value
        elif isinstance(value, (Terminal, Plain)):
            agree(claimed(value, world), real)
        elif isinstance(value, (TokenValue, *LOGITS_LIKE)):
            agree(claimed(value, world), real)
            values[node] = value
    return asked, ""


def spied(node: Node, values: dict[Node, Any], asked: set[Any]) -> Any:
    """`trace_value`, noting which rules it asks."""
    original = dict(RULES)

    def spy(overload: Any) -> Any:
        def rule(*args: Any, **kwargs: Any) -> Any:
            asked.add(overload)
            return original[overload](*args, **kwargs)

        return rule

    def spied_tokens(context: Context, *args: Any, **kwargs: Any) -> Any:
        asked.add(context.op)
        return by_tokens(context, *args, **kwargs)

    by_tokens = tokenwise.read_by_tokens
    for overload in original:
        RULES[overload] = spy(overload)
    tokenwise.read_by_tokens = evaluator.by_tokens = spied_tokens
    try:
        return trace_value(node, values)
    finally:
        RULES.update(original)
        tokenwise.read_by_tokens = evaluator.by_tokens = by_tokens

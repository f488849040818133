"""Evaluates one node from the values of its inputs: through its ATen trace, by the rules, or token by token.

Raises `Escape` for a node that no rule reads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fusedhead.analysis.reasons import Untraced
from fusedhead.compat import HigherOrderOperator, OpOverload, tree_leaves, unset_fake_temporarily
from fusedhead.graph.dry_run import changed_arguments
from fusedhead.graph.nodes import fake, inputs, name_of
from fusedhead.graph.op_names import PROJECTIONS
from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_size
from fusedhead.graph.tracing import trace
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import LOGITS_LIKE, LogitsLike, detached
from fusedhead.ir.terminal import Terminal
from fusedhead.ir.tokenwise import TokenValue, token_values_of
from fusedhead.rules import RULES
from fusedhead.rules.setitem import columns_set
from fusedhead.rules.table import Context
from fusedhead.rules.tokenwise.dispatch import read_by_tokens as by_tokens
from fusedhead.rules.tokenwise.reasons import NotByTokens

LARGEST_CONSTANT = 4096  # entries of a literal index that may be written into the graph again


def is_value(x: Any) -> bool:
    return isinstance(x, (Plain, Terminal, TokenValue, *LOGITS_LIKE))


def all_followed(values: Any) -> list[LogitsLike]:
    return [v for v in tree_leaves(values, is_leaf=is_value) if isinstance(v, LOGITS_LIKE)]


def evaluate(node: Node, program: GraphModule, values: dict[Node, Any]) -> Any:
    """The value of one Dynamo node from its inputs' values, through its ATen trace and the rules."""
    operands = [values.get(source, Plain(source, fake(source))) for source in inputs(node)]
    env: dict[Node, Any] = {}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    env.update(zip(placeholders, operands))
    check_writes(program)
    calls = [n for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    for op in program.graph.nodes:
        if op.op == "output":
            return map_arg(op.args[0], env.__getitem__)
        if op.op == "get_attr":
            env[op] = constant(getattr(program, str(op.target)), node)
        if op.op != "call_function":
            continue
        args, kwargs = map_arg((op.args, op.kwargs), env.__getitem__)
        if op.target is operator.getitem and isinstance(args[0], (list, tuple)):
            env[op] = args[0][args[1]]
            continue
        val = fake(node) if op is calls[-1] else op.meta.get("val")
        if all_followed((args, kwargs)) or any(isinstance(x, TokenValue) for x in tree_leaves((args, kwargs))):
            plain = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Plain))
            if any(True for x in plain for _ in token_values_of(x)):
                raise Escape(NotByTokens.WITH_A_TOTAL, op=op.target)
            env[op] = applied(op, Context(node, val, op.target, alone=op.meta.get("val")), args, kwargs)
        elif op.target in RULES and is_projection(op):
            env[op] = RULES[op.target](Context(node, val, op.target), *args, **kwargs)
        else:
            env[op] = Plain(Expr(op.target, args, kwargs), val)
    raise AssertionError("a traced graph has an output")


def check_writes(program: GraphModule) -> None:
    """Raise Escape unless every write in a trace is read by the name of its result.

    This holds for a node that is one in-place op, and for a write to memory that the node itself allocated.
    """
    result = program.graph.output_node().args[0]
    for op in program.graph.nodes:
        if not isinstance(op.target, OpOverload):
            continue
        changed = tree_leaves(list(changed_arguments(op.target, op.args, op.kwargs)))
        for target in (x for x in changed if isinstance(x, Node)):
            if target.op == "placeholder":
                is_named = result is op
            else:
                readers = [user for user in target.users if user is not op]
                is_named = not shares(target) and all(user < op and not shares(user) for user in readers)
            if not is_named:
                raise Escape(Untraced.WRITES_SHARED_MEMORY, name=name_of(op))


def shares(op: Node) -> bool:
    """Whether the result of a traced op may share memory with another name, other than one that the op writes to."""
    schema = getattr(op.target, "_schema", None)
    views = [r for r in schema.returns if r.alias_info is not None] if schema is not None else ()
    return schema is None or any(not view.alias_info.is_write for view in views)


def applied(op: Node, context: Context, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The value of an op on followed values: by its rule, or token by token where no rule gives one."""
    mutable = is_mutable(op.target)
    target = pure_overload(op.target) if mutable else op.target
    if target is None:
        raise Escape(Untraced.WRITES_IN_PLACE, name=name_of(op), target=op.target)
    if not isinstance(target, OpOverload):  # Python arithmetic on sizes
        raise Escape(Untraced.NOT_PYTORCH, name=name_of(op))
    single = [x for x in tree_leaves((args, kwargs)) if isinstance(x, TokenValue) and x.val.ndim == 0]
    if single:  # it is small: the token program returns it, and the graph's own ops read it
        raise Escape(Untraced.SINGLE_NUMBER, name=name_of(op))
    context, refused = replace(context, op=target), None
    if target in RULES and not any(isinstance(x, TokenValue) for x in tree_leaves((args, kwargs))):
        try:
            value = RULES[target](context, *args, **kwargs)
            if value is not None:
                return value
        except Escape as escape:
            refused = escape
    try:
        value = by_tokens(context, *args, **kwargs)
        if any(same_size(size, 0) for part in token_values_of(value) for size in part.val.shape):
            raise Escape(NotByTokens.NO_ENTRIES, op=target)
        return value
    except Escape as escape:
        if refused is None:
            raise
        raise refused from escape


def is_mutable(target: Any) -> bool:
    return bool(getattr(getattr(target, "_schema", None), "is_mutable", False))


def pure_overload(target: Any) -> Any:
    """The pure overload of an in-place one (``aten.div_.Tensor`` → ``aten.div.Tensor``), or None."""
    if not is_mutable(target):
        return None
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    pure = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), overload, None)
    return None if is_mutable(pure) else pure


def constant(tensor: Any, node: Node) -> Plain:
    """A constant that a node holds (a list used as an index), as a call that makes it again."""
    with unset_fake_temporarily():
        if tensor.dtype == torch.int64 and torch.equal(tensor, torch.arange(tensor.numel(), device=tensor.device)):
            return Plain(Expr(torch.ops.aten.arange.default, (tensor.numel(),)), tensor)  # range(N), however long
        if tensor.numel() > LARGEST_CONSTANT or tensor.is_floating_point():
            raise Escape(Untraced.HOLDS_A_CONSTANT, name=name_of(node))
        return Plain(Expr(torch.tensor, (tensor.tolist(),), {"dtype": tensor.dtype}), tensor)


def is_projection(op: Node) -> bool:
    return name_of(op) in PROJECTIONS


def trace_value(node: Node, values: dict[Node, Any], traces: Callable[[Node], GraphModule] = trace) -> Any:
    """`evaluate`, and the nodes that have no ATen trace of their own."""
    if name_of(node) == "getitem" and isinstance(values.get(node.args[0]), (list, tuple)):  # type: ignore[arg-type]
        return values[node.args[0]][node.args[1]]  # type: ignore[index]
    value = values.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
    if name_of(node) == "_get_data_attr" and isinstance(value, LOGITS_LIKE):
        return detached(replace(value, val=fake(node)))  # z.data: traced alone it is a constant
    if isinstance(node.target, HigherOrderOperator):
        # its trace may be empty: a gradient hook is the identity on values
        if name_of(node) == "autograd_function_apply":
            raise Escape(Untraced.AUTOGRAD_FUNCTION)
        raise Escape(Untraced.HIGHER_ORDER, name=name_of(node))
    if name_of(node) == "setitem":
        return columns_set(node, values.get(node.args[0]))  # type: ignore[arg-type]
    if not isinstance(fake(node), (torch.Tensor, tuple, list)):
        raise Escape(Untraced.NO_TENSOR, name=name_of(node))
    try:
        program = traces(node)
    except Exception as error:  # no rule reads a node that cannot be traced alone
        raise Escape(Untraced.NOT_TRACED, name=name_of(node), kind=type(error).__name__, error=error) from error
    return evaluate(node, program, values)

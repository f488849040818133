"""The abstract interpreter: walks a Dynamo graph and says what each tensor is, relative to the logits of a head.

The result is a list of `Site`s, one per projection that a loss could hang on: its terminals (where one number a
row remains), its outputs (where logits leave the graph), and its escapes (uses no rule can read, each with a
sentence). This file reads; it never edits and never decides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from fusedhead.aliases import storage, written
from fusedhead.read import Traces, fake, inputs, name_of, trace
from fusedhead.rowwise import Rowwise, parts
from fusedhead.rowwise import detached as detached_rows
from fusedhead.rules import RULES
from fusedhead.rules.projections import SPELLINGS
from fusedhead.rules.rowwise import read as by_rows
from fusedhead.rules.table import Context
from fusedhead.setitem import columns_set
from fusedhead.terminals import Terminal
from fusedhead.values import (
    FOLLOWED,
    Call,
    Escape,
    Followed,
    Logits,
    Plain,
    Projection,
    detached,
    logits_of,
    rows_of_hidden,
)

# Names of the ops that can end a head; only projections that reach one of them are looked at.
ANCHORS = frozenset(
    {
        "cross_entropy",
        "cross_entropy_loss",
        "nll_loss",
        "nll_loss_nd",
        "log_softmax",
        "_log_softmax",
        "logsumexp",
        "kl_div",
    }
)


EMPTY: Mapping[Node, Logits] = {}
LARGEST_CONSTANT = 4096  # entries of a literal index that may be written into the graph again


@dataclass(eq=False)
class Site:
    """One projection and everything the graph does with its product."""

    head: Projection
    terminals: list[tuple[Node, Terminal]] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)  # followed nodes that the graph returns
    escapes: list[tuple[Node, str]] = field(default_factory=list)
    followed: list[Node] = field(default_factory=list)  # nodes whose value is followed, in order
    sizes: list[tuple[Node, Any]] = field(default_factory=list)  # nodes that are numbers of rows, and what is as long
    overwritten: list[Node] = field(default_factory=list)  # nodes whose value was changed in place later


@dataclass(eq=False)
class Reading:
    sites: list[Site]
    values: dict[Node, Any]
    rowwise: dict[Node, Any] = field(default_factory=dict)  # what no statistic gives, computed token by token
    unread: dict[Node, str] = field(default_factory=dict)  # products in which no rule sees a head, and why


def candidates(graph: Graph) -> set[Node]:
    """The projections from which an anchor is reached without passing another projection."""
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [node for node in graph.nodes if node.op.startswith("call_") and name_of(node) in ANCHORS]
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            if source in seen or not source.op.startswith("call_"):
                continue
            seen.add(source)
            if name_of(source) in SPELLINGS:
                found.add(source)
            else:
                stack.append(source)
    return found


def grad_modes(graph: Graph, enabled: bool | None = None) -> dict[Node, bool]:
    """Whether gradients are recorded at each node; ``enabled`` where the graph begins, by default as it is here."""
    enabled, modes = torch.is_grad_enabled() if enabled is None else enabled, {}
    for node in graph.nodes:
        if node.op == "call_function" and name_of(node) == "_set_grad_enabled":
            enabled = bool(node.args[0])
        modes[node] = enabled
    return modes


def is_value(x: Any) -> bool:
    return isinstance(x, (Plain, Terminal, Rowwise, *FOLLOWED))


def all_followed(values: Any) -> list[Followed]:
    return [v for v in tree_leaves(values, is_leaf=is_value) if isinstance(v, FOLLOWED)]


def evaluate(node: Node, program: GraphModule, known: dict[Node, Any]) -> Any:
    """The value of one Dynamo node from its inputs' values, through its ATen trace and the rules."""
    given = [known.get(source, Plain(source, fake(source))) for source in inputs(node)]
    env: dict[Node, Any] = {}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    env.update(zip(placeholders, given))
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
        if all_followed((args, kwargs)) or any(isinstance(x, Rowwise) for x in tree_leaves((args, kwargs))):
            env[op] = applied(op, Context(node, val), args, kwargs)
        elif op.target in RULES and is_projection(op):
            env[op] = RULES[op.target](Context(node, val), *args, **kwargs)
        else:
            env[op] = Plain(Call(op.target, args, kwargs), val)
    raise AssertionError("a traced graph has an output")


def applied(op: Node, context: Context, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an op makes of followed values: by its rule, or, if it has none that says so, token by token."""
    mutable = is_mutable(op.target)
    target = out_of_place(op.target) if mutable else op.target
    if target is None:
        raise Escape(f"{name_of(op)} changes the logits in place ({op.target})")
    if not isinstance(target, torch._ops.OpOverload):  # Python's own, on sizes
        raise Escape(f"{name_of(op)} is no op of PyTorch")
    single = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Rowwise) and x.val.ndim == 0]
    if single:  # it is small, and stays a result of the row program; the program's own ops take it from there
        raise Escape(f"{name_of(op)} is taken of a single number that comes from the logits")
    unread = Escape(f"{name_of(op)} is not read by any rule ({op.target})")
    try:
        if target not in RULES or any(isinstance(x, Rowwise) for x in tree_leaves((args, kwargs))):
            raise unread
        return RULES[target](context, *args, **kwargs)
    except Escape as escape:
        try:
            return by_rows(target, context.val, op.meta.get("val"), args, kwargs)
        except Escape as rowwise:
            raise (rowwise if escape is unread else escape) from rowwise


def is_mutable(target: Any) -> bool:
    return bool(getattr(getattr(target, "_schema", None), "is_mutable", False))


def out_of_place(target: Any) -> Any:
    """The pure overload of an in-place one (``aten.div_.Tensor`` → ``aten.div.Tensor``), or None."""
    if not is_mutable(target):
        return None
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    return getattr(packet, overload, None)


def overwritten(node: Node, values: dict[Node, Any], sites: dict[Projection, Site], grad: bool) -> None:
    """After an in-place step on followed logits: the name that was written to means the new value from here on.

    Pure as long as no other live name shares the memory; otherwise the site escapes.
    """
    target = next(iter(written(node)), None)
    if target is None or target not in values or not isinstance(values[node], (Rowwise, *FOLLOWED)):
        return

    def escape(reason: str) -> None:
        for head in heads_of([values[node]]):
            sites[head].escapes.append((node, reason))

    if not grad and fake(target).requires_grad:
        escape(f"{name_of(node)} changes the logits in place where no gradient is recorded")
    memory = storage(fake(target))
    later = set(following(node))
    for other, value in values.items():
        if other in (node, target) or storage(fake(other)) != memory or not heads_of([value]):
            continue
        if any(user in later for user in other.users):
            escape(f"{name_of(node)} changes logits that {other.name} is a view of")
    values[target] = values[node]
    for head in heads_of([values[node]]):
        sites[head].overwritten.append(target)


def following(node: Node) -> Iterable[Node]:
    """The nodes after one, in order."""
    while node.next.op != "root":
        node = node.next
        yield node


def constant(tensor: Any, node: Node) -> Plain:
    """A constant that a node holds (a list used as an index), as a call that makes it again."""
    with unset_fake_temporarily():
        if tensor.numel() > LARGEST_CONSTANT or tensor.is_floating_point():
            raise Escape(f"{name_of(node)} holds a constant tensor")
        return Plain(Call(torch.tensor, (tensor.tolist(),), {"dtype": tensor.dtype}), tensor)


def is_projection(op: Node) -> bool:
    return name_of(op) in SPELLINGS


def interpret(
    graph: Graph, starts: Iterable[Node] | None = None, grad: bool | None = None, stacks: Mapping[Node, Logits] = EMPTY
) -> Reading:
    """Follow the logits of every candidate projection, or of those in ``starts``, through the graph.

    ``stacks``: nodes that are the logits of several heads at once.
    """
    starts, modes = candidates(graph) if starts is None else set(starts), grad_modes(graph, grad)
    values: dict[Node, Any] = {}
    sites: dict[Projection, Site] = {}
    rowwise: dict[Node, Any] = {}
    unread: dict[Node, str] = {}
    traced = Traces()
    for node in graph.nodes:
        sources = [values[s] for s in node.all_input_nodes if s in values]
        heads = heads_of(sources)
        if node.op == "output":
            for source in node.all_input_nodes:
                returned(source, values.get(source), sites)
            continue
        if node in stacks:
            values[node] = stacks[node] if modes[node] else detached(stacks[node])
            sites[stacks[node].head] = Site(stacks[node].head, followed=[*stacks[node].head.products, node])
            continue
        if not heads and node not in starts:
            continue
        if counts_rows(node, values):
            logits = logits_of(values[node.args[0]])  # type: ignore[index]
            sites[logits.head].sizes.append((node, rows_of_hidden(logits)))
            continue
        try:
            value = follow(node, values, traced)
        except Escape as escape:
            if not heads:
                unread[node] = str(escape)
            if not all(isinstance(s, Rowwise) and s.small for s in sources):
                for head in heads:
                    sites[head].escapes.append((node, str(escape)))
            continue
        if not modes[node]:
            value = tree_map(quiet, value, is_leaf=is_value)
        if any(True for _ in parts(value)):
            rowwise[node] = value
        else:
            record(node, value, heads, sites)
        if not isinstance(value, (Terminal, Plain)):
            values[node] = value
            overwritten(node, values, sites, modes[node])
    return Reading(list(sites.values()), values, rowwise, unread)


def returned(source: Node, value: Any, sites: dict[Projection, Site]) -> None:
    """File what the graph returns: logits leave it, small results of theirs do anyway."""
    for followed in all_followed(value):
        sites[logits_of(followed).head].outputs.append(source)
    for part in parts(value):
        if not part.small:
            for head in part.heads:
                sites[head].escapes.append((source, f"{source.name}, computed from all logits, is returned"))


def counts_rows(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a node is the length of a row dimension of followed logits, which after a mask only the data know."""
    value = values.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
    if node.target is not torch.ops.aten.sym_size.int or not isinstance(value, FOLLOWED):
        return False
    return int(node.args[1]) % value.val.ndim != logits_of(value).class_dim  # type: ignore[arg-type]


def quiet(value: Any) -> Any:
    return detached_rows(value, torch.ops.aten.detach.default) if isinstance(value, Rowwise) else detached(value)


def follow(node: Node, values: dict[Node, Any], traced: Callable[[Node], GraphModule] = trace) -> Any:
    """`evaluate`, for the nodes that have no ATen trace of their own too."""
    if name_of(node) == "getitem" and isinstance(values.get(node.args[0]), (list, tuple)):  # type: ignore[arg-type]
        return values[node.args[0]][node.args[1]]  # type: ignore[index]
    value = values.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
    if name_of(node) == "_get_data_attr" and isinstance(value, FOLLOWED):
        return detached(replace(value, val=fake(node)))  # z.data: traced alone it is a constant
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        # traced alone it may look like nothing: a gradient hook is the identity on values
        raise Escape(f"{name_of(node)} takes the logits, and what it does with them is not read")
    if name_of(node) == "setitem":
        return columns_set(node, values.get(node.args[0]))  # type: ignore[arg-type]
    if not isinstance(fake(node), (torch.Tensor, tuple, list)):
        raise Escape(f"{name_of(node)} of the logits is no tensor")
    try:
        program = traced(node)
    except Exception as error:  # a node that cannot be traced alone is a use we cannot read
        raise Escape(f"{name_of(node)} cannot be traced alone ({type(error).__name__}: {error})") from error
    return evaluate(node, program, values)


def heads_of(values: Any) -> set[Projection]:
    """The heads that values, or results that hang on them, belong to."""
    found = [v.logits if isinstance(v, Terminal) else v for v in tree_leaves(values, is_leaf=is_value)]
    met = {head for v in found for part in parts(v) for head in part.heads}
    return met.union(logits_of(v).head for v in found if isinstance(v, FOLLOWED))


def record(node: Node, value: Any, heads: Iterable[Projection], sites: dict[Projection, Site]) -> None:
    """File what was learnt about a node under the heads it belongs to."""
    if isinstance(value, Terminal):
        sites[value.logits.head].terminals.append((node, value))
        for head in set(heads) - {value.logits.head}:
            sites[head].escapes.append((node, f"{value.computes} mixes two heads"))
        return
    found = all_followed(value)
    ends = [v for v in tree_leaves(value, is_leaf=is_value) if isinstance(v, Terminal)]
    for head in {end.logits.head for end in ends}:
        sites[head].followed.append(node)  # a tuple of results: its getitems are the terminals
    if not found and not ends:
        for head in heads:
            sites[head].escapes.append((node, f"{name_of(node)} of the logits is not followed"))
    for each in found:
        head = logits_of(each).head
        sites.setdefault(head, Site(head)).followed.append(node)

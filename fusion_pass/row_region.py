"""From rowwise values in a graph to one `head_rows` call: what belongs to it, what it returns, how it is emitted.

A `Region` holds every node whose logits-wide value no statistic gives, of one head or of several that meet. Its
results are the small values that the rest of the graph reads. This file decides nothing about safety.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves, tree_map

from fusedhead.aliases import written
from fusedhead.emit import Emit, named, static
from fusedhead.groups import Group
from fusedhead.interpret import Reading
from fusedhead.kernels.columns import Transform
from fusedhead.kernels.row_program import HEAD, ITEM, Line, Ref, RowProgram, Unspeakable, spelled
from fusedhead.operands import operands, replay
from fusedhead.read import fake, name_of
from fusedhead.rewrite import erase
from fusedhead.rowwise import RowCall, RowLeaf, RowOutput, Rowwise, Seed, parts
from fusedhead.rules.projections import SPELLINGS
from fusedhead.rules.rowwise_operands import same
from fusedhead.safety import leaves
from fusedhead.terminals import Terminal
from fusedhead.values import Call, Logits, Plain, Projection

aten = torch.ops.aten


@dataclass(eq=False)
class Region:
    """Rowwise nodes of heads that meet, and what the graph needs of them."""

    heads: set[Projection]
    inside: list[Node] = field(default_factory=list)  # nodes that the call replaces
    results: list[tuple[Node, Any]] = field(default_factory=list)  # nodes to be given a value: Rowwise or Plain

    @property
    def outputs(self) -> list[Rowwise]:
        """The values that leave the row program, each once."""
        found = {id(p.expr): p for _, value in self.results for p in parts(value)}
        return list(found.values())

    @property
    def computes(self) -> str:
        names = dict.fromkeys(name for out in self.outputs for name in sorted(calls(out.expr)))
        shown = [n for n in names if n not in QUIET]
        return f"rowwise({', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''})"


QUIET = frozenset(
    {"to", "mul", "add", "sub", "div", "sum", "neg", "reshape", "unsqueeze", "detach", "getitem", "squeeze"}
)  # too common to tell anything in a report


def calls(expr: Any) -> set[str]:
    """The names of the ops of an expression."""
    found, stack, seen = set(), [expr], set()
    while stack:
        x = stack.pop()
        if isinstance(x, RowCall) and id(x) not in seen:
            seen.add(id(x))
            packet = getattr(x.op, "_overloadpacket", x.op)
            found.add(getattr(packet, "__name__", str(packet)).strip("_"))
            stack += tree_leaves(x.args)
    return found


def leaves_of(values: Iterable[Rowwise]) -> tuple[list[Seed], list[RowLeaf]]:
    """The heads and outside tensors that expressions read, each once, in order of appearance."""
    seeds: dict[int, Seed] = {}
    outside: dict[int, RowLeaf] = {}
    seen: set[int] = set()

    def visit(x: Any) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, Seed):
            seeds.setdefault(id(x.logits), x)
        elif isinstance(x, RowLeaf):
            outside[id(x)] = x
        elif isinstance(x, RowCall):
            for a in tree_leaves((x.args, x.kwargs)):
                visit(a)

    for value in values:
        visit(value.expr)
    return list(seeds.values()), list(outside.values())


def regions(reading: Reading) -> list[Region]:
    """Every region of a graph, heads that meet in one value together."""
    found: list[Region] = []
    for node, value in reading.rowwise.items():
        heads = {head for part in parts(value) for head in part.heads}
        meeting = [r for r in found if r.heads & heads]
        joined = Region(heads.union(*(r.heads for r in meeting)))
        for r in meeting:
            joined.inside += r.inside
            found.remove(r)
        joined.inside.append(node)
        found.append(joined)
    for region in found:
        settle(region, reading)
    return [r for r in found if r.results]


def teachers(reading: Reading) -> set[Node]:
    """Projections whose logits a row program would read as tensors from outside: a teacher that has no loss."""
    found: set[Node] = set()
    values = [part for value in reading.rowwise.values() for part in parts(value)]
    known = {site.head.node for site in reading.sites}
    stack = leaves(leaf.value for leaf in leaves_of(values)[1] if leaf.by_rows and leaf.value.val.ndim)
    seen: set[Node] = set()
    vocabs = {head.weight.val.shape[0] for part in values for head in part.heads}
    while stack:
        node = stack.pop()
        val = fake(node)
        if node in seen or not node.op.startswith("call_") or not isinstance(val, Tensor):
            continue
        seen.add(node)
        if name_of(node) in SPELLINGS:
            if node not in known and val.ndim and static(val.shape[-1]) in vocabs:
                found.add(node)
            continue
        stack += node.all_input_nodes
    return found


def erase_unused(reading: Reading, heads: set[Projection]) -> None:
    """Remove what is computed from one of these heads, token by token, and read by nobody, in place or not.

    A write to a small result is read through that result's name.
    """

    def may_go(node: Node, value: Any) -> bool:
        if not any(True for _ in written(node)):
            return any(part.heads & heads for part in parts(value))
        a_result = isinstance(value, Rowwise) and value.small
        return not a_result and all(part.heads <= heads for part in parts(value))

    nodes = [node for node, value in reading.rowwise.items() if not node._erased and may_go(node, value)]
    erase(reversed(nodes), set(nodes).__contains__)


def settle(region: Region, reading: Reading) -> None:
    """Keep what only the row program can compute; what hangs on its small results alone stays in the graph."""
    values = reading.rowwise

    def unfit(node: Node) -> bool:
        """Whether a node's value cannot be handed out: as wide as the logits, or a tuple."""
        value = values.get(node)
        return isinstance(value, (list, tuple)) or (isinstance(value, Rowwise) and not value.small)

    inner: set[Node] = set()
    for node in reversed(region.inside):
        if unfit(node) or any(user in inner for user in node.users):
            inner.add(node)
    for node in region.inside:
        followed = any(s in reading.values and s not in values for s in node.all_input_nodes)
        first = followed or any(unfit(s) for s in node.all_input_nodes)
        if (node not in inner and first) or (
            node in inner and not unfit(node) and any(user not in inner for user in node.users)
        ):
            region.results.append((node, values[node]))
    made = inner.union(node for node, _ in region.results)
    region.inside = [node for node in region.inside if node in made]


def program(values: Sequence[Rowwise], seeds: Sequence[Seed], outside: Sequence[RowLeaf]) -> RowProgram:
    """The row program of ``values``. Its inputs are h, w, cols, rows of every seed, then the outside tensors.

    Raises Unspeakable for a constant it has no form for.
    """
    lines: list[Line] = []
    known: dict[Any, Ref] = {}
    place = {id(s.logits): i for i, s in enumerate(seeds)}
    at = {id(x): 4 * len(seeds) + i for i, x in enumerate(outside)}

    def add(line: Line) -> Ref:
        key = repr(line)
        if key not in known:
            known[key] = Ref("v", len(lines))
            lines.append(line)
        return known[key]

    def ref(x: Any) -> Any:
        if isinstance(x, (Seed, RowCall)) and id(x) in known:
            return known[id(x)]
        if isinstance(x, Seed):
            i, text = 4 * place[id(x.logits)], Transform(x.logits.steps).text
            dtype = x.logits.val.dtype
            out = add(Line(HEAD, (Ref("r", i), Ref("t", i + 1), Ref("t", i + 2), Ref("r", i + 3), text, dtype)))
        elif isinstance(x, RowLeaf):
            return Ref("r" if x.by_rows else "t", at[id(x)])
        elif isinstance(x, RowCall):
            args = tuple(tree_map(ref, list(x.args)))
            name = ITEM if x.op is operator.getitem else str(x.op).removeprefix("aten.")
            kwargs = tuple((k, ref(v)) for k, v in x.kwargs.items())
            out = add(Line(name, tuple(tuple(a) if isinstance(a, list) else a for a in args), kwargs))
        else:
            spelled(x)
            return x
        known[id(x)] = out
        return out

    results = tuple(ref(v.expr).at for v in values)
    return RowProgram(tuple(lines), results)


def fuse(graph: Graph, region: Region, memory: int, grad: dict[Node, bool], position: dict[Node, int]) -> None:
    """Replace a region's results by those of ``head_rows`` calls.

    One call serves all results if every operand exists before the first of them; else each has its own.
    """
    emit = Emit(graph)
    batches = [region.results]
    first = min(position[node] for node, _ in region.results)
    if any(position[n] >= first for n in reads(region.outputs)) or len({grad[n] for n, _ in region.results}) > 1:
        batches = [[result] for result in region.results]
    for batch in batches:
        emit_results(emit, batch, memory, grad)
    inside = set(region.inside)
    erase(reversed(region.inside), inside.__contains__)
    made = set(emit.made)
    erase(reversed(emit.made), made.__contains__)
    left = [node.name for node in region.inside if not node._erased]
    assert not left, f"{', '.join(left)} would still be computed"  # the caller then keeps the original graph


def reads(values: Iterable[Rowwise]) -> list[Node]:
    """The graph's nodes that row programs of these values read, besides hidden states and weights."""
    seeds, outside = leaves_of(values)
    vectors = [v for seed in seeds for v in (*seed.logits.cols, *(r.value for r in seed.logits.rows))]
    return leaves([*(x.value for x in outside), *vectors])


def emit_results(emit: Emit, results: list[tuple[Node, Any]], memory: int, grad: dict[Node, bool]) -> None:
    """Calls that serve some results, before the first of them, and what takes the place of each."""
    outputs = list({id(p.expr): p for _, value in results for p in parts(value)}.values())
    anchor = results[0][0]
    made: dict[int, Node] = {}
    with emit.before(anchor, anchor, grad=grad[anchor]):
        for some in by_tokens(outputs):
            made |= emit_call(emit, some, anchor, memory)
    for node, value in results:
        with emit.before(node, node, grad=grad[node]):
            replacement = resolved(emit, value, made, leaves_of(outputs)[0])
            if not grad[node] or not fake(node).requires_grad:
                replacement = emit(aten.detach.default, replacement)
            replacement = emit.cast(replacement, value.val.dtype)
            node.replace_all_uses_with(replacement)
            emit.replaced(node, replacement)


def by_tokens(outputs: Iterable[Rowwise]) -> list[list[Rowwise]]:
    """Values with as many tokens together: one call walks over the tokens once."""
    found: list[tuple[Any, list[Rowwise]]] = []
    for out in outputs:
        tokens = math.prod(s for s, is_tail in zip(out.val.shape, out.tail) if not is_tail)
        for known, some in found:
            if same(known, tokens):
                some.append(out)
                break
        else:
            found.append((tokens, [out]))
    return [some for _, some in found]


def emit_call(emit: Emit, outputs: list[Rowwise], anchor: Node, memory: int) -> dict[int, Node]:
    """One ``head_rows`` call and the nodes of its results, by the identity of their expressions."""
    seeds, outside = leaves_of(outputs)
    tensors: list[Node] = []
    for seed in seeds:
        nothing = Terminal(seed.logits, None, "", frozenset(), lambda *_: None)  # type: ignore[arg-type, return-value]
        h, w, _, cols, rows, _ = operands(emit, Group([(anchor, nothing)]))
        tensors += [h, w, cols, emit(aten.t.default, rows)]
    tensors += [emit.ref(leaf.value) for leaf in outside]
    text = program(outputs, seeds, outside).text
    call = named(emit(torch.ops.fusedhead.head_rows.default, tensors, text, memory), "head_rows")
    return {id(out.expr): emit(operator.getitem, call, i) for i, out in enumerate(outputs)}


def resolved(emit: Emit, value: Any, made: dict[int, Node], seeds: Sequence[Seed]) -> Node:
    """The node that holds a result in the program's shape."""
    if isinstance(value, Rowwise):
        return shaped(emit, value, made[id(value.expr)], seeds)

    def substitute(x: Any) -> Any:
        if isinstance(x, RowOutput):
            return shaped(emit, x.value, made[id(x.value.expr)], seeds)
        if isinstance(x, Plain):
            return substitute(x.ref)
        if isinstance(x, Call):
            args, kwargs = tree_map(substitute, (x.args, x.kwargs))
            return emit(x.op, *args, **kwargs)
        return emit.ref(x)

    return substitute(value)


def shaped(emit: Emit, value: Rowwise, node: Node, seeds: Sequence[Seed]) -> Node:
    """A result [N, *tail] in the program's own dimensions."""
    rows = [d for d, is_tail in enumerate(value.tail) if not is_tail]
    order = [*rows, *(d for d, is_tail in enumerate(value.tail) if is_tail)]
    known = [static(value.val.shape[d]) for d in order]
    if fake_shape(node) != known or len(rows) != 1:
        sizes: list[Any] = list(known)
        unknown = [i for i, s in enumerate(sizes) if s is None]
        if len(unknown) == 1:
            sizes[unknown[0]] = -1
        elif unknown:
            sizes = row_sizes(emit, [value.val.shape[d] for d in rows], seeds) + sizes[len(rows) :]
        node = emit(aten.reshape.default, node, sizes)
    if order != sorted(order):
        node = emit(aten.permute.default, node, [order.index(d) for d in range(len(order))])
    return node


def fake_shape(node: Node) -> list[int | None]:
    return [static(s) for s in fake(node).shape]


def row_sizes(emit: Emit, wanted: list[Any], seeds: Sequence[Seed]) -> list[Any]:
    """Sizes of the token dimensions, several of them symbolic: those of a head's hidden states."""
    for seed in seeds:
        logits: Logits = seed.logits
        hidden = emit.ref(logits.head.hidden)
        node = emit.last(replay(emit, hidden, logits.row_steps, logits.head.weight.val.shape[1]), logits.class_dim)
        found = emit.sizes(node)[:-1]
        if len(found) == len(wanted):
            return found
    raise Unspeakable("several token dimensions of symbolic size")

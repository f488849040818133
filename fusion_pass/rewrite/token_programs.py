"""From a `Region` to ``head_rows`` calls: the program's text, its operands, and its results in the program's shapes."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from fusedhead.analysis.token_regions import Region, by_tokens, differentiated, operands_of
from fusedhead.graph.facts import Places, before
from fusedhead.graph.motion import brought, put_behind
from fusedhead.graph.nodes import fake
from fusedhead.graph.sizes import static
from fusedhead.ir.builder import Emit, named
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import Logits
from fusedhead.ir.tokenwise import HeadInput, ProgramResult, TokenInput, TokenValue, inputs_of, token_values_of
from fusedhead.kernels.tokenwise.program import HEAD, ITEM, Line, Ref, RowProgram, Unspeakable, spelled
from fusedhead.kernels.transform.transform import Transform
from fusedhead.rewrite.operands import operands, replay
from fusedhead.rewrite.statistics import erase

aten = torch.ops.aten
MOST_MOVED = 64  # nodes behind a call: sums of losses and their logging


def program(values: Sequence[TokenValue], seeds: Sequence[HeadInput], outside: Sequence[TokenInput]) -> RowProgram:
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
        if isinstance(x, (HeadInput, Expr)) and id(x) in known:
            return known[id(x)]
        if isinstance(x, HeadInput):
            i, text = 4 * place[id(x.logits)], Transform(x.logits.steps).text
            dtype = x.logits.val.dtype
            out = add(Line(HEAD, (Ref("r", i), Ref("t", i + 1), Ref("t", i + 2), Ref("r", i + 3), text, dtype)))
        elif isinstance(x, TokenInput):
            return Ref("r" if x.by_rows else "t", at[id(x)])
        elif isinstance(x, Expr):
            args, kwargs = x.mapped(ref)
            name = ITEM if x.op is operator.getitem else str(x.op).removeprefix("aten.")
            listed = tuple(tuple(a) if isinstance(a, list) else a for a in args)
            out = add(Line(name, listed, tuple(kwargs.items())))
        else:
            spelled(x)
            return x
        known[id(x)] = out
        return out

    results = tuple(ref(v.expr).at for v in values)
    return RowProgram(tuple(lines), results)


def fuse(
    graph: Graph, region: Region, memory: int, grad: dict[Node, bool], places: Places, followed: Collection[Node]
) -> list[Node]:
    """Replace a region's results by those of ``head_rows`` calls, which are returned. ``followed`` nodes stay in place.

    One call serves all results if every operand can be computed before the first of them, or if what is made of them
    can wait for the last; else each has its own.
    """
    emit = Emit(graph)
    together = meeting_place(region, grad, places, followed)
    if together is None:
        for result in region.results:
            emit_results(emit, [result], result[0], memory, grad)
    else:
        emit_results(emit, region.results, together, memory, grad)
    inside = set(region.inside)
    erase(reversed(region.inside), inside.__contains__)
    made = set(emit.made)
    erase(reversed(emit.made), made.__contains__)
    left = [node.name for node in region.inside if not node._erased]
    assert not left, f"{', '.join(left)} would still be computed"  # the caller then keeps the original graph
    return [node for node in emit.made if not node._erased and node.target is torch.ops.fusedhead.head_rows.default]


def meeting_place(region: Region, grad: dict[Node, bool], places: Places, followed: Collection[Node]) -> Node | None:
    """The node before which one call can serve all results of a region, once others were moved; None if there is none.

    A loss of a student, say, whose teacher is run after it: the teacher is run before it, or the loss waits.
    """
    results = sorted(node for node, _ in region.results)  # type: ignore[type-var]
    first, last = results[0], results[-1]
    if len({grad[node] for node in results}) > 1:
        return None
    operands, fixed = operands_of(region.outputs), {*results, *region.inside, *followed}
    if brought(operands, first, fixed, places):
        return first
    fixed.update(operands)
    if places.autocast(first) == places.autocast(last) and put_behind(results[:-1], last, fixed, places, MOST_MOVED):
        return last
    return None


def emit_results(
    emit: Emit, results: list[tuple[Node, Any]], anchor: Node, memory: int, grad: dict[Node, bool]
) -> None:
    """Calls that serve some results, before ``anchor``, and what takes the place of each."""
    outputs = list({id(p.expr): p for _, value in results for p in token_values_of(value)}.values())
    made: dict[int, Node] = {}
    with emit.before(anchor, anchor, grad=grad[anchor]):
        for some in by_tokens(outputs):
            made |= emit_call(emit, some, memory)
    for node, value in results:
        with emit.before(anchor if before(node, anchor) else node, node, grad=grad[node]):
            replacement = resolved(emit, value, made, inputs_of(outputs)[0])
            if not grad[node] or not fake(node).requires_grad:
                replacement = emit(aten.detach.default, replacement)
            replacement = emit.cast(replacement, value.val.dtype)
            node.replace_all_uses_with(replacement)
            emit.replaced(node, replacement)


def emit_call(emit: Emit, outputs: list[TokenValue], memory: int) -> dict[int, Node]:
    """One ``head_rows`` call and the nodes of its results, by the identity of their expressions.

    An operand that no gradient reaches is detached: it would cost a product, and get zeros where eager code has none.
    """
    seeds, outside = inputs_of(outputs)
    reached = differentiated(outputs)

    def given(node: Node, identity: int) -> Node:
        return node if identity in reached or not fake(node).requires_grad else emit(aten.detach.default, node)

    tensors: list[Node] = []
    for seed in seeds:
        h, w, _, cols, rows, _ = operands(emit, seed.logits)
        tensors += [given(node, id(seed.logits)) for node in (h, w, cols, emit(aten.t.default, rows))]
    tensors += [given(emit.ref(leaf.value), id(leaf)) for leaf in outside]
    text = program(outputs, seeds, outside).text
    call = named(emit(torch.ops.fusedhead.head_rows.default, tensors, text, memory), "head_rows")
    return {id(out.expr): emit(operator.getitem, call, i) for i, out in enumerate(outputs)}


def resolved(emit: Emit, value: Any, made: dict[int, Node], seeds: Sequence[HeadInput]) -> Node:
    """The node that holds a result in the program's shape."""
    if isinstance(value, TokenValue):
        return shaped(emit, value, made[id(value.expr)], seeds)

    def substitute(x: Any) -> Any:
        if isinstance(x, ProgramResult):
            return shaped(emit, x.value, made[id(x.value.expr)], seeds)
        if isinstance(x, Plain):
            return substitute(x.ref)
        if isinstance(x, Expr):
            args, kwargs = x.mapped(substitute)
            return emit(x.op, *args, **kwargs)
        return emit.ref(x)

    return substitute(value)


def shaped(emit: Emit, value: TokenValue, node: Node, seeds: Sequence[HeadInput]) -> Node:
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


def row_sizes(emit: Emit, wanted: list[Any], seeds: Sequence[HeadInput]) -> list[Any]:
    """Sizes of the token dimensions, several of them symbolic: those of a head's hidden states."""
    for seed in seeds:
        logits: Logits = seed.logits
        hidden = emit.ref(logits.head.hidden)
        node = emit.last(replay(emit, hidden, logits.row_steps, logits.head.weight.val.shape[1]), logits.class_dim)
        found = emit.sizes(node)[:-1]
        if len(found) == len(wanted):
            return found
    raise Unspeakable("several token dimensions of symbolic size")

"""Token programs: a `Region` becomes ``head_rows`` calls, with the program's text, operands and result shapes."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from fusedhead.analysis.body import Body, Emitted
from fusedhead.analysis.site import Region
from fusedhead.analysis.token_regions import by_tokens, differentiated, program_operands
from fusedhead.graph.edit import erase
from fusedhead.graph.effects import writes
from fusedhead.graph.facts import GraphFacts, before
from fusedhead.graph.motion import hoist_before, sink_after
from fusedhead.graph.nodes import fake
from fusedhead.graph.sizes import static
from fusedhead.ir.builder import Emit, named
from fusedhead.ir.expr import Expr, Plain, walk
from fusedhead.ir.logits import Logits
from fusedhead.ir.tokenwise import HeadInput, ProgramResult, TokenInput, TokenValue, inputs_of, token_values_of
from fusedhead.kernels.tokenwise.program import HEAD, ITEM, Line, Ref, RowProgram, Unspeakable, argument_text
from fusedhead.kernels.transform.transform import Transform
from fusedhead.rewrite.operands import emit_operands, replay

aten = torch.ops.aten
MOST_SUNK = 64  # nodes after a call: sums of losses and their logging


def program(
    values: Sequence[TokenValue],
    seeds: Sequence[HeadInput],
    outside: Sequence[TokenInput],
    input_exprs: Sequence[Expr] = (),
) -> RowProgram:
    """The token program of ``values``. Its inputs are h, w, cols, rows of every head, then the other tensors, then the
    values of the expressions ``input_exprs``.

    Raises Unspeakable for a constant that has no text form.
    """
    lines: list[Line] = []
    place = {id(s.logits): i for i, s in enumerate(seeds)}
    at = {id(x): 4 * len(seeds) + i for i, x in enumerate((*outside, *input_exprs))}
    refs: dict[Any, Ref] = {id(x): Ref("r", at[id(x)]) for x in input_exprs}

    def add(line: Line) -> Ref:
        key = repr(line)
        if key not in refs:
            refs[key] = Ref("v", len(lines))
            lines.append(line)
        return refs[key]

    def ref(x: Any) -> Any:
        if isinstance(x, (HeadInput, Expr)) and id(x) in refs:
            return refs[id(x)]
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
            argument_text(x)
            return x
        refs[id(x)] = out
        return out

    results = tuple(ref(v.expr).at for v in values)
    return RowProgram(tuple(lines), results)


def run(body: Body) -> None:
    """Replace the regions whose heads are fused by ``head_rows`` calls."""
    reading = body.reading
    kept_heads = {site.head for site, reason, _ in body.decisions if reason}
    regions = [region for region in dict.fromkeys(body.regions.values()) if not region.heads & kept_heads]
    terminals = (node for site in reading.sites for node, _ in site.terminals)
    fixed = {*reading.values, *reading.tokenwise, *terminals} if regions else set()
    for region in regions:
        calls = emit_region(region, fixed, reading.tokenwise, body.facts, body.options.budget)
        body.emitted.append(Emitted(calls, list(region.heads), True))


def emit_region(
    region: Region, fixed: Collection[Node], values: Mapping[Node, Any], facts: GraphFacts, memory: int
) -> list[Node]:
    """Replace a region's results by those of ``head_rows`` calls, and return the calls. ``fixed`` nodes are not moved.

    One call serves all results if every operand can be computed before the first result, or if all uses of the results
    can run after the last. Two calls serve them if this holds for those under no_grad and for the others. Otherwise
    each result has its own call.
    """
    emit = Emit(facts.graph)
    anchor = meeting_place(region, fixed, facts)
    if anchor is not None:
        emit_results(emit, region.results, anchor, facts, memory)
    elif not emit_constants_first(emit, region, fixed, values, facts, memory):
        for result in region.results:
            emit_results(emit, [result], result[0], facts, memory)
    inside = set(region.inside)
    erase(reversed(region.inside), inside.__contains__)
    emitted = set(emit.nodes)
    erase(reversed(emit.nodes), emitted.__contains__)
    computed = [node.name for node in region.inside if not node._erased]
    assert not computed, f"{', '.join(computed)} would still be computed"  # the caller then keeps the original graph
    return [node for node in emit.nodes if not node._erased and node.target is torch.ops.fusedhead.head_rows.default]


def emit_constants_first(
    emit: Emit,
    region: Region,
    fixed: Collection[Node],
    values: Mapping[Node, Any],
    facts: GraphFacts,
    memory: int,
) -> bool:
    """Emit one call for the results under no_grad and one for the others; False where they have no place.

    The second reads the few numbers a row that the first makes under no_grad, such as the indices of the teacher's
    largest logits, so that it does not compute that head again.
    """
    if any(map(writes, region.inside)):  # a value that is returned may be written to before it is read
        return False
    constant = [result for result in region.results if not facts.grad_mode(result[0])]
    gradient_results = [result for result in region.results if facts.grad_mode(result[0])]
    returned = {node for node, _ in constant}
    for node in region.inside:
        value = values.get(node)
        read = any(user in values and facts.grad_mode(user) for user in node.users)
        small = isinstance(value, TokenValue) and value.small and isinstance(value.expr, Expr)
        if node not in returned and small and read and not facts.grad_mode(node):
            constant.append((node, value))
    first, second = (replace(region, results=results) for results in (constant, gradient_results))
    if not constant or not gradient_results:
        return False
    places = [meeting_place(part, fixed, facts) for part in (first, second)]
    if places[0] is None or places[1] is None or not before(places[0], places[1]):
        return False
    earlier_nodes = emit_results(emit, constant, places[0], facts, memory)
    emit_results(emit, gradient_results, places[1], facts, memory, earlier_nodes)
    return True


def meeting_place(region: Region, fixed: Collection[Node], facts: GraphFacts) -> Node | None:
    """The node before which one call can serve all results of a region, after moving other nodes; None if there is
    none.

    Example: a student's loss whose teacher runs later. Either the teacher is moved up, or the loss is moved down.
    """
    results = sorted(node for node, _ in region.results)  # type: ignore[type-var]
    first, last = results[0], results[-1]
    if len(set(map(facts.grad_mode, results))) > 1:
        return None
    operands, unmoved = program_operands(region.outputs), {*results, *region.inside, *fixed}
    if hoist_before(operands, first, unmoved, facts):
        return first
    unmoved.update(operands)
    same_autocast = facts.autocast(first) == facts.autocast(last)
    return last if same_autocast and sink_after(results[:-1], last, unmoved, facts, MOST_SUNK) else None


def emit_results(
    emit: Emit,
    results: list[tuple[Node, Any]],
    anchor: Node,
    facts: GraphFacts,
    memory: int,
    earlier_nodes: Mapping[int, Node] = MappingProxyType({}),
) -> dict[int, Node]:
    """Emit calls for some results before ``anchor``, and replace the results; returns the nodes of their values
    by the identity of their expressions. ``earlier_nodes`` are those of an earlier call.
    """
    outputs = list({id(p.expr): p for _, value in results for p in token_values_of(value)}.values())
    nodes: dict[int, Node] = {}
    with emit.before(anchor, anchor, grad=facts.grad_mode(anchor)):
        for group in by_tokens(outputs):
            nodes |= emit_call(emit, group, memory, earlier_nodes)
    for node, value in results:
        grad = facts.grad_mode(node)
        with emit.before(anchor if before(node, anchor) else node, node, grad=grad):
            replacement = result_node(emit, value, nodes, inputs_of(outputs)[0])
            if not grad or not fake(node).requires_grad:
                replacement = emit(aten.detach.default, replacement)
            replacement = emit.cast(replacement, value.val.dtype)
            node.replace_all_uses_with(replacement)
            emit.replaced(node, replacement)
    return nodes


def emit_call(emit: Emit, outputs: list[TokenValue], memory: int, earlier_nodes: Mapping[int, Node]) -> dict[int, Node]:
    """Emit one ``head_rows`` call; returns the nodes of its results by the identity of their expressions.

    An operand that no gradient reaches is detached. Otherwise it would cost a product and get zeros where eager gives
    None.
    """

    def unknown(expr: Expr) -> bool:
        return id(expr) not in earlier_nodes

    seeds, outside = inputs_of(outputs, unknown)
    reached = differentiated(outputs)
    read = [x for x in walk(*(out.expr for out in outputs), into=unknown) if isinstance(x, Expr) and not unknown(x)]

    def operand(node: Node, identity: int) -> Node:
        return node if identity in reached or not fake(node).requires_grad else emit(aten.detach.default, node)

    tensors: list[Node] = []
    for seed in seeds:
        h, w, _, cols, rows, _ = emit_operands(emit, seed.logits)
        tensors += [operand(node, id(seed.logits)) for node in (h, w, cols, emit(aten.t.default, rows))]
    tensors += [operand(emit.ref(leaf.value), id(leaf)) for leaf in outside]
    tensors += [earlier_nodes[id(expr)] for expr in read]
    text = program(outputs, seeds, outside, read).text
    call = named(emit(torch.ops.fusedhead.head_rows.default, tensors, text, memory), "head_rows")
    return {id(out.expr): emit(operator.getitem, call, i) for i, out in enumerate(outputs)}


def result_node(emit: Emit, value: Any, nodes: dict[int, Node], seeds: Sequence[HeadInput]) -> Node:
    """The node that holds a result in the program's shape."""
    if isinstance(value, TokenValue):
        return shaped(emit, value, nodes[id(value.expr)], seeds)

    def substitute(x: Any) -> Any:
        if isinstance(x, ProgramResult):
            return shaped(emit, x.value, nodes[id(x.value.expr)], seeds)
        if isinstance(x, Plain):
            return substitute(x.ref)
        if isinstance(x, Expr):
            args, kwargs = x.mapped(substitute)
            return emit(x.op, *args, **kwargs)
        return emit.ref(x)

    return substitute(value)


def shaped(emit: Emit, value: TokenValue, node: Node, seeds: Sequence[HeadInput]) -> Node:
    """A result [N, *tail] in the program's own shape."""
    rows = [d for d, is_tail in enumerate(value.tail) if not is_tail]
    order = [*rows, *(d for d, is_tail in enumerate(value.tail) if is_tail)]
    sizes_known = [static(value.val.shape[d]) for d in order]
    if fake_shape(node) != sizes_known or len(rows) != 1:
        sizes: list[Any] = list(sizes_known)
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
        sizes = emit.sizes(node)[:-1]
        if len(sizes) == len(wanted):
            return sizes
    raise Unspeakable("several token dimensions of symbolic size")

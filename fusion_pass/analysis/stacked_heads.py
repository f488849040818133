"""Stacked heads: several heads whose logits are one tensor under one loss (codebooks of audio models, multi-token
prediction).

| spelling                                                        | the parts                                   |
|-----------------------------------------------------------------|---------------------------------------------|
| ``torch.stack([F.linear(h, w) for w in weights], dim)``         | the products                                |
| ``F.linear(h, w).view(B, T, K, V)``, w [K V, D]                 | the product with K pieces of the weight     |
| ``F.linear(h, w).view(N, C, K)``, w [C K, D], classes second    | the products with ``w[k::K]``               |
| ``torch.einsum("btd,kvd->btkv", h, w)``, ``torch.bmm(h, w)``    | the products with ``w[k]``                  |

`legality` decides which of them are fused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.evaluator import trace_value
from fusedhead.analysis.interpreter import interpret
from fusedhead.analysis.projections import above_losses
from fusedhead.analysis.reasons import Untraced
from fusedhead.analysis.site import Reading
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.op_names import CONCATENATES, PROJECTIONS, equation_terms, joined_parts
from fusedhead.graph.reasons import Escape
from fusedhead.graph.recipes import rooted_in_inputs
from fusedhead.graph.tracing import Traces
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import HIDDEN, Logits, Projection, RowStep, StackedProjection, piece_of, rows_of_hidden

aten = torch.ops.aten
# Nodes that may stack heads. Heads that are concatenated along the tokens are a stack too: its index is a token
# dimension.
STACKS = CONCATENATES | {"stack", "view", "reshape", "unflatten", "einsum", "bmm", "matmul"}
MOST_HEADS = 64  # each is a sweep


def reading_with_stacks(body: Body, starts: Collection[Node]) -> Reading | None:
    """The reading of a graph in which all stacks are followed to their losses; None if the graph has no stack."""
    facts, traces = body.facts, body.traces
    stacks = {}
    for node in nodes_under_losses(facts):
        logits = stack_at(node, traces) or stack_at(node, traces, classes_first=True)
        if logits is not None and len(set(map(facts.grad_mode, (node, *logits.head.products)))) == 1:
            stacks[node] = logits
    retried: set[Node] = set()
    while stacks:
        products = {p for logits in stacks.values() for p in logits.head.products}
        reading = interpret(facts, traces, set(starts) - products, stacks)
        sites = [site for site in reading.sites if isinstance(site.head, StackedProjection)]
        sites = [site for site in sites if site.terminals and not site.escapes]
        served = {site.head.node for site in sites if not any(t.logits.rows for _, t in site.terminals)}
        if served >= stacks.keys():
            return reading
        served_stacks = {node: logits for node, logits in stacks.items() if node in served}
        for node in stacks.keys() - served - retried:  # the classes may be the other of two dimensions
            retried.add(node)
            logits = stack_at(node, traces, classes_first=True)
            served_stacks |= {node: logits} if logits is not None else {}
        stacks = served_stacks
    return None


def nodes_under_losses(facts: GraphFacts) -> list[Node]:
    """The nodes between a graph's losses and its products, including the products, in order."""
    return sorted(above_losses(facts, {*PROJECTIONS, "bmm"}))  # type: ignore[type-var]


def stack_at(node: Node, traces: Traces, *, classes_first: bool = False) -> Logits | None:
    """The logits of a node that stacks several heads. ``classes_first``: the head's index is the last dimension."""
    if not isinstance(fake(node), Tensor):
        return None
    try:
        if classes_first:
            stacked = stack_of_slices(node, traces, classes_first=True)
        else:
            stacked = stack_of_products(node, traces) or stack_of_slices(node, traces) or stack_of_weights(node)
    except Escape:
        return None
    if stacked is None or not 2 <= len(stacked[0]) <= MOST_HEADS:
        return None
    parts, dim = stacked
    first = parts[0]
    alike = all(
        p.val.shape == first.val.shape and p.head.dtype == first.head.dtype and p.class_dim == p.val.ndim - 1
        and p.head.weight.val.shape == first.head.weight.val.shape and not p.rows for p in parts
    )  # fmt: skip
    if not alike or dim >= fake(node).ndim - 1:
        return None
    class_dim, moved = fake(node).ndim - 1, tuple[RowStep, ...]()
    if name_of(node) in CONCATENATES:
        moved = (RowStep(aten.flatten.using_ints, (dim, dim + 1), keeps_order=True),)
    elif classes_first:
        moved, class_dim = (RowStep(aten.movedim.int, (dim + 1, dim), keeps_order=True),), dim
    hidden = Plain(Expr(aten.stack.default, ([rows_of_hidden(p) for p in parts], dim)), None)
    head = StackedProjection(node, hidden, first.head.weight, first.head.dtype, tuple(parts), dim)
    vocab = first.vocab and (0, int(first.val.shape[-1]))
    return Logits(head, fake(node), class_dim, row_steps=moved, vocab=vocab)


def product_logits(node: Node, traces: Traces) -> Logits:
    """The logits of a projection that nothing else reads. Raises Escape."""
    value = trace_value(node, {}, traces) if len(node.users) == 1 and name_of(node) in PROJECTIONS else None
    if not isinstance(value, Logits):
        raise Escape(Untraced.NOT_A_PRODUCT)
    return value


def stack_of_products(node: Node, traces: Traces) -> tuple[list[Logits], int] | None:
    """The stack of products that are stacked, or concatenated along another dimension than the classes."""
    joined = joined_parts(node)
    if joined is None or len(set(joined[0])) != len(joined[0]):
        return None
    return [product_logits(part, traces) for part in joined[0]], joined[1]


def stack_of_slices(node: Node, traces: Traces, *, classes_first: bool = False) -> tuple[list[Logits], int] | None:
    """The stack of a product whose classes are viewed as K times V, or as V times K."""
    source = node.args[0] if node.args else None
    if name_of(node) not in ("view", "reshape", "unflatten") or not isinstance(source, Node):
        return None
    if name_of(source) not in PROJECTIONS or fake(node).ndim < 3:
        return None
    before, after = fake(source).shape, list(fake(node).shape)
    count, vocab = after[-2:]
    if not isinstance(count, int) or not isinstance(vocab, int) or before[-1] != count * vocab or count < 2:
        return None
    whole = product_logits(source, traces)
    rows = [s if isinstance(s, int) else -1 for s in after[:-2]]
    if rows.count(-1) > 1 or math.prod(before[:-1]) != math.prod(after[:-2]) or whole.row_steps:
        return None
    step = RowStep(aten.reshape.default, ([*rows, HIDDEN],), keeps_order=True)
    if classes_first:
        count, vocab = vocab, count
        return [every_kth(whole, k, count, fake(node).select(-1, k), step) for k in range(count)], len(rows)
    bounds = [(k * vocab, (k + 1) * vocab) for k in range(count)]
    return [
        replace(
            whole,
            val=fake(node).select(-2, k),
            class_dim=len(rows),
            row_steps=(step,),
            vocab=bounds[k],
            cols=piece_of(whole.cols, *bounds[k]),
        )
        for k in range(count)
    ], len(rows)


def every_kth(whole: Logits, first: int, step: int, val: Tensor, rows: RowStep) -> Logits:
    """The product with every ``step``-th row of the weight, from ``first`` on."""

    def strided(x: Plain) -> Plain:
        return Plain(Expr(aten.slice.Tensor, (x.ref, 0, first, x.val.shape[0], step)), x.val[first::step])

    head = replace(whole.head, weight=strided(whole.head.weight))
    cols = tuple(map(strided, whole.cols))
    return replace(whole, head=head, val=val, class_dim=val.ndim - 1, row_steps=(rows,), cols=cols)


def stack_of_weights(node: Node) -> tuple[list[Logits], int] | None:
    """The stack of one product with K weights: ``einsum`` or ``bmm`` with a weight of three dimensions."""
    terms = letters_of(node)
    if terms is None:
        return None
    hidden, h, weight, w, out = terms
    shared = [c for c in w if c in h and c not in out]
    classes = [c for c in w if c not in h and c in out and out.endswith(c)]
    numbers = [c for c in w if c not in (*shared, *classes)]
    if len(shared) != 1 or len(classes) != 1 or len(numbers) != 1 or len(set(h)) != len(h) or numbers[0] not in out:
        return None
    d, v, k = shared[0], classes[0], numbers[0]
    if not all(isinstance(size, int) for size in fake(weight).shape):
        return None
    rows = h.replace(k, "").replace(d, "")
    count = fake(weight).shape[w.index(k)]
    if k in h and not is_parameter(weight):  # attention looks the same
        return None
    if not h.endswith(d) or out.replace(k, "") != rows + v or not isinstance(count, int) or count > MOST_HEADS:
        return None
    parts = []
    for i in range(count):
        selected = Expr(aten.select.int, (weight, w.index(k), i))
        stored = selected if w.index(v) < w.index(d) else Expr(aten.t.default, (selected,))
        value = fake(weight).select(w.index(k), i)
        selected_states = Expr(aten.select.int, (hidden, h.index(k), i)) if k in h else hidden
        states = Plain(selected_states, fake(hidden).select(h.index(k), i) if k in h else fake(hidden))
        head = Projection(node, states, Plain(stored, value if stored is selected else value.t()), fake(node).dtype)
        val = fake(node).select(out.index(k), i)
        if val.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return None
        if any(x.dtype != val.dtype for x in (fake(weight), fake(hidden))):
            return None
        start = Logits(head, val, val.ndim - 1)
        parts.append(start.step(val))
    return parts, out.index(k)


def is_parameter(node: Node) -> bool:
    """Whether a node is a parameter or a view of one."""
    while node.op != "placeholder" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return isinstance(fake(node), torch.nn.Parameter)


def letters_of(node: Node) -> tuple[Node, str, Node, str, str] | None:
    """(hidden states, their letters, weight, its letters, those of the result) of a product with several weights."""
    if name_of(node) == "einsum" and isinstance(node.args[0], str):
        operands: Sequence[Any] = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        terms, out = equation_terms(node.args[0])
        if any("." in term for term in terms) or not out or len(terms) != 2 or len(operands) != 2:
            return None
        pairs = list(zip(operands, terms))
    elif name_of(node) in ("bmm", "matmul") and len(node.args) == 2 and not node.kwargs:
        pairs, out = list(zip(node.args, ("knd", "kdv"))), "knv"
        if any(not isinstance(x, Node) or fake(x).ndim != 3 for x in node.args):
            return None
    else:
        return None
    for (hidden, h), (weight, w) in (pairs, pairs[::-1]):
        is_weight = isinstance(hidden, Node) and isinstance(weight, Node) and len(w) == 3
        if is_weight and rooted_in_inputs(weight) and 0 not in fake(weight).stride() and len(set(w)) == 3:
            return hidden, h, weight, w, out
    return None

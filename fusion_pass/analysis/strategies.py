"""Which reading of a graph the pass goes on with, where several are true of it.

| what a graph has                                              | what is read then                          |
|---------------------------------------------------------------|--------------------------------------------|
| logits of several heads, stacked under one loss               | the stack, as one head of parts (`stacks`) |
| a projection without a loss, whose logits a row program reads | that one too: a teacher                    |
| logits computed for a row program, and again for statistics   | the row program alone, token by token      |

Another reading is taken only where it serves everything that the plain one does. This file compares readings; it
must not know whether a site is safe to rewrite or pays, and edits nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.fx import Graph, Node

from fusedhead.analysis import stacked_heads
from fusedhead.analysis.interpreter import Reading, interpret
from fusedhead.analysis.token_regions import Region, by_tokens, regions
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.sizes import static
from fusedhead.ir.expr import nodes_of
from fusedhead.ir.tokenwise import inputs_of, token_values_of
from fusedhead.rules.projections import SPELLINGS


def chosen(graph: Graph, starts: set[Node], grad: bool) -> Reading:
    """The reading of a graph whose logits begin at ``starts``; ``grad``: whether its first node records gradients."""
    with_stacks = stacked_heads.reading_of(graph, starts, grad)
    if with_stacks is not None:
        return with_stacks
    reading = interpret(graph, starts, grad)
    more = teachers(reading)
    if more:
        again = interpret(graph, starts | more, grad)
        if not any(site.escapes for site in again.sites if site.head.node in more):
            starts, reading = starts | more, again
    return in_one_sweep(graph, starts, grad, reading)


def teachers(reading: Reading) -> set[Node]:
    """Projections whose logits a row program would read as tensors from outside: a teacher that has no loss."""
    found: set[Node] = set()
    values = [part for value in reading.rowwise.values() for part in token_values_of(value)]
    known = {site.head.node for site in reading.sites}
    stack = nodes_of(leaf.value for leaf in inputs_of(values)[1] if leaf.by_rows and leaf.value.val.ndim)
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


def in_one_sweep(graph: Graph, starts: set[Node], grad: bool, reading: Reading) -> Reading:
    """The reading where logits that a row program needs are computed for it alone, if it serves all that reads them.

    A cross-entropy beside a divergence or a top-k would be a sweep of its own: one product forward and two or three
    for its gradients, where a row program has the logits of a window at hand.
    """
    several = swept_again(reading, regions(reading))
    if not several:
        return reading
    again = interpret(graph, starts, grad, by_rows=several)
    left = [site for site in again.sites if site.head.node in several and (site.terminals or site.escapes)]
    if left or again.unread.keys() != reading.unread.keys():
        return reading
    found = regions(again)
    if swept_again(again, found):
        return reading
    calls = [len(by_tokens(region.outputs)) for region in found]
    return again if max(calls, default=0) == 1 else reading


def swept_again(reading: Reading, found: Iterable[Region]) -> set[Node]:
    """Projections whose logits are computed for a row program and again: for statistics, or as other logits of it.

    ``found``: the regions of the reading.
    """
    several: set[Node] = set()
    with_statistics = {site.head for site in reading.sites if site.terminals}
    for region in found:
        seeds = [seed.logits.head for seed in inputs_of(region.outputs)[0]]
        several |= {head.node for head in region.heads if head in with_statistics or seeds.count(head) > 1}
    return several

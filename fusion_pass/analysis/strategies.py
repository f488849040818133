"""Chooses between alternative interpretations of one graph.

| what a graph has                                                  | the alternative                   |
|-------------------------------------------------------------------|-----------------------------------|
| logits of several heads, stacked under one loss                   | the stack, as one head of parts   |
| a projection without a loss, whose logits a token program reads   | it is a head too: a teacher       |
| logits computed for a token program, and again for statistics     | the token program alone           |

An alternative is chosen only where it serves every use that the plain interpretation serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.fx import Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.interpreter import interpret
from fusedhead.analysis.lone_heads import heads_without_loss
from fusedhead.analysis.projections import candidates
from fusedhead.analysis.site import Reading
from fusedhead.analysis.stacked_heads import reading_with_stacks
from fusedhead.analysis.token_regions import by_tokens, regions
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.op_names import PROJECTIONS
from fusedhead.graph.sizes import static
from fusedhead.ir.expr import nodes_of
from fusedhead.ir.tokenwise import inputs_of, token_values_of


def find_projections(body: Body) -> None:
    """Find the projections to follow: those under a loss, and those whose logits the graph only returns."""
    if body.is_top and body.options.logits == "deferred":
        body.returned = heads_without_loss(body.graph)
    body.starts = candidates(body.facts) | body.returned


def run(body: Body) -> None:
    """Set the reading of a body."""
    body.reading = choose(body)


def choose(body: Body) -> Reading:
    """The best interpretation of a body's graph."""
    reading = reading_with_stacks(body, body.starts)
    if reading is not None:
        return reading
    reading = interpret(body.facts, body.traces, body.starts)
    for alternative in ALTERNATIVES:
        reading = alternative(body, reading) or reading
    return reading


def serves_all_of(reading: Reading, heads: Iterable[Node]) -> bool:
    """Whether an interpretation reads every use of these projections."""
    heads = set(heads)
    return not any(site.escapes for site in reading.sites if site.head.node in heads)


def with_teacher_heads(body: Body, plain: Reading) -> Reading | None:
    """The interpretation that also follows teachers: projections without a loss whose logits a token program reads."""
    teachers = teacher_heads(plain)
    if not teachers:
        return None
    reading = interpret(body.facts, body.traces, body.starts | teachers)
    if not serves_all_of(reading, teachers):
        return None
    body.starts |= teachers
    return reading


def teacher_heads(reading: Reading) -> set[Node]:
    """Projections whose logits a token program would read as tensors from outside."""
    teachers: set[Node] = set()
    values = [part for value in reading.tokenwise.values() for part in token_values_of(value)]
    heads = {site.head.node for site in reading.sites}
    stack = nodes_of(leaf.value for leaf in inputs_of(values)[1] if leaf.by_rows and leaf.value.val.ndim)
    seen: set[Node] = set()
    vocabs = {head.weight.val.shape[0] for part in values for head in part.heads}
    while stack:
        node = stack.pop()
        val = fake(node)
        if node in seen or not node.op.startswith("call_") or not isinstance(val, Tensor):
            continue
        seen.add(node)
        if name_of(node) in PROJECTIONS:
            if node not in heads and val.ndim and static(val.shape[-1]) in vocabs:
                teachers.add(node)
            continue
        stack += node.all_input_nodes
    return teachers


def tokenwise_only(body: Body, plain: Reading) -> Reading | None:
    """The interpretation in which one token program computes everything that is read of some logits.

    A cross-entropy beside a divergence or a top-k would take a sweep of its own, one product forward and two or three
    for its gradients. A token program has the logits of a window already.
    """
    repeated = heads_computed_twice(plain)
    if not repeated:
        return None
    reading = interpret(body.facts, body.traces, body.starts, tokenwise_only=repeated)
    with_statistics = any(site.terminals for site in reading.sites if site.head.node in repeated)
    if with_statistics or not serves_all_of(reading, repeated) or reading.no_rule.keys() != plain.no_rule.keys():
        return None
    if heads_computed_twice(reading):
        return None
    calls = [len(by_tokens(region.outputs)) for region in regions(reading)]
    return reading if max(calls, default=0) == 1 else None


def heads_computed_twice(reading: Reading) -> set[Node]:
    """Projections whose logits are computed for a token program and a second time: for statistics, or as other logits
    of the program.
    """
    repeated: set[Node] = set()
    with_statistics = {site.head for site in reading.sites if site.terminals}
    for region in regions(reading):
        heads: list[Any] = [seed.logits.head for seed in inputs_of(region.outputs)[0]]
        repeated |= {head.node for head in region.heads if head in with_statistics or heads.count(head) > 1}
    return repeated


ALTERNATIVES: tuple[Callable[[Body, Reading], Reading | None], ...] = (with_teacher_heads, tokenwise_only)

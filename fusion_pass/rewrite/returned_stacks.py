"""Stacked heads whose logits a graph only returns: ``return torch.stack([head(h) for head in heads], dim=1)``.

Models with codebooks leave the loss to their caller. The stack is computed outside the differentiated graph, like the
logits of one head (`returned`), and handed out deferred: a loss of ``z[:, k]`` is then one of that head alone. What is
a stack is for `stacks` to say, in all its spellings. This file knows no losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from fusedhead.analysis.interpreter import Site, run_of
from fusedhead.analysis.lone_heads import pays
from fusedhead.analysis.projections import candidates
from fusedhead.analysis.source_lines import place
from fusedhead.analysis.stacked_heads import SPELLED, stack_at
from fusedhead.canonicalize.unstack_heads import ARRANGING
from fusedhead.compat import FakeTensor
from fusedhead.graph import weight_recipes
from fusedhead.graph.modes import grad_modes
from fusedhead.graph.nodes import Traces, fake, hint, name_of
from fusedhead.ir.expr import nodes_of
from fusedhead.ir.logits import Logits, Projection, StackedProjection
from fusedhead.legality.checks import Mutations, functorch
from fusedhead.legality.profitability import gate
from fusedhead.options import Options
from fusedhead.report.records import asked_outside, describe
from fusedhead.report.report import HeadRecord
from fusedhead.rewrite import returned_logits
from fusedhead.rewrite.returned_logits import Wrap
from fusedhead.rewrite.statistics import erase


@dataclass(eq=False)
class Returned:
    """A stack of heads, and the nodes from it to the graph's outputs, in order."""

    head: StackedProjection
    kept: list[Node]
    outputs: list[Node]


def separate(graph: Graph, options: Options) -> tuple[list[HeadRecord], Wrap | None]:
    """Take stacks that are only returned out of the graph, in place: their records, and what goes around the graph."""
    if not any(name_of(node) in SPELLED for node in graph.nodes) or functorch(graph):
        return [], None
    modes, mutations, traced = grad_modes(graph), Mutations(graph), Traces()
    with_loss, slots = candidates(graph), list(graph.output_node().args[0])  # type: ignore[arg-type]
    records: list[HeadRecord] = []
    recipes, gone = [], []
    for found in stacks(graph, traced):
        if not with_loss.isdisjoint(found.head.products):
            continue
        own = weight_recipes.making(nodes_of([part.head.weight for part in found.head.parts]))
        making, sources = returned_logits.program_of(found.outputs, {*found.kept, *found.head.products, *own})
        if not movable(found, making, sources, modes, mutations):
            continue
        small = gate([Site(found.head)], options.min_logits)(Site(found.head))
        records += [record(part, small, options.budget) for part in found.head.parts]
        if small:
            continue
        sizes = {node: [n for x in (node, *node.all_input_nodes) for n in last_sizes(x)] for node in making}
        sizes[found.kept[0]] = [*sizes[found.kept[0]], len(found.head.parts)]  # a head's number is none of a token
        heads = {part.head.node: part.head for part in found.head.parts}
        runs = tuple(map(run_of, heads))
        weights = tuple(tensors_of(head, sources) for head in heads.values())
        recipes += [
            replace(
                returned_logits.recipe_of(making, sources, sizes, slot, node, fake(node).ndim - 1),
                runs=runs,
                weights=weights,
            )
            for slot, node in enumerate(slots)
            if node in found.outputs
        ]
        gone += making
    wrap = returned_logits.redirect(graph, recipes) if recipes else None
    erase(reversed(gone), set(gone).__contains__)
    return records, wrap


def last_sizes(node: Node) -> tuple[Any, ...]:
    """The sizes of a tensor that belong to heads: those of a weight, and the last of anything else."""
    value = fake(node)
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(value.shape) if isinstance(value, torch.nn.Parameter) else tuple(value.shape[-1:])


def stacks(graph: Graph, traced: Traces) -> Iterator[Returned]:
    """The stacks that the graph returns, in the order of their outputs."""
    seen: set[Node] = set()
    stack = list(graph.output_node().all_input_nodes)
    while stack:
        node = stack.pop(0)
        if node in seen or not node.op.startswith("call_"):
            continue
        seen.add(node)
        logits = stack_at(node, traced) if name_of(node) in SPELLED else None
        if logits is not None and not logits.row_steps and isinstance(logits.head, StackedProjection):
            found = returned_from(logits.head, node)
            if found is not None:
                yield found
        elif name_of(node) in ARRANGING:
            stack += node.all_input_nodes


def returned_from(head: StackedProjection, node: Node) -> Returned | None:
    """A stack with what is made of it, if that is arranged and returned and no more."""
    if not all(pays(*part.head.weight.val.shape) for part in head.parts):
        return None
    found, ahead = Returned(head, [node], []), [node]
    while ahead:
        source = ahead.pop()
        for user in source.users:
            if user.op == "output":
                found.outputs += [source] if source not in found.outputs else []
            elif name_of(user) in ARRANGING and len(user.all_input_nodes) == 1:
                found.kept.append(user)
                ahead.append(user)
            else:
                return None
    whole = all(fake(output).shape[-1:] == fake(node).shape[-1:] for output in found.outputs)
    return found if whole and found.outputs else None


def movable(
    found: Returned, making: list[Node], sources: list[Node], modes: dict[Node, bool], mutations: Mutations
) -> bool:
    """Whether the stack may be computed when the graph has run."""
    own = {*found.kept, *found.head.products}
    recorded = {modes[node] for node in own}
    tokens = [hint(n) or 0 for n in fake(found.head.node).shape[:-1]]
    plain = all(type(fake(s)) in (FakeTensor, torch.nn.Parameter) for s in sources if isinstance(fake(s), torch.Tensor))
    return (
        plain
        and mutations.anywhere_after(making[0], own) is None
        and recorded in ({True}, {False})
        and (recorded == {True} or torch.Size(tokens).numel() >= returned_logits.LEAST_TOKENS)
        and all(user in own or user.op == "output" for node in own for user in node.users)
        and mutations.anywhere_after(making[0], sources) is None
    )


def tensors_of(head: Projection, sources: list[Node]) -> frozenset[int]:
    """Which of a recipe's sources, of those that are tensors, a head's weight is made of."""
    weight = nodes_of([head.weight])
    found = {*weight, *(source for node in weight_recipes.making(weight) for source in node.all_input_nodes)}
    tensors = [source for source in sources if isinstance(fake(source), torch.Tensor)]
    return frozenset(at for at, source in enumerate(tensors) if source in found)


def record(part: Logits, small: str, budget: int) -> HeadRecord:
    """What the report says of one head of a stack, whose weight may be rows of a larger one."""
    weight = replace(part.head.weight, val=part.head.weight.val[: part.val.shape[-1]])
    site = Site(replace(part.head, weight=weight), outputs=[part.head.node])
    return describe(site, small, place(part.head.node), [] if small else [asked_outside(site, budget)], not small)

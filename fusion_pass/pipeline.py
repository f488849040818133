"""The pass: reads a Dynamo graph and the graphs that it runs, and fuses the sites that are to be fused.

`fuse_graph` edits the graph it is given and returns what it did; it may raise, and the backend then falls back to a
copy of the original. Which reading is used is for `readings` to say, which sites stay as they are for `decisions`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from fusedhead.analysis import strategies, token_regions
from fusedhead.analysis.interpreter import RUN, Reading
from fusedhead.analysis.lone_heads import heads_without_loss
from fusedhead.analysis.projections import candidates
from fusedhead.analysis.source_lines import place, products_of
from fusedhead.canonicalize import (
    deduplicate_weights,
    duplicate_transposed,
    expand_broadcasts,
    expand_soft_labels,
    functionalize_accumulation,
    functionalize_subscripts,
    inline_checkpoints,
    inline_regions,
    merge_chunks,
    unstack_heads,
)
from fusedhead.canonicalize.inline_checkpoints import CHECKPOINTS
from fusedhead.graph.modes import grad_modes
from fusedhead.graph.nodes import name_of
from fusedhead.ir.logits import Projection, logits_of
from fusedhead.legality import profitability, sharding
from fusedhead.legality.checks import Mutations
from fusedhead.legality.legality import decide, why_returned
from fusedhead.legality.missed_heads import unread
from fusedhead.legality.other_products import unlisted
from fusedhead.options import Options
from fusedhead.report.records import Price, asked_outside, describe, priced, row_priced
from fusedhead.report.report import HeadRecord, Report
from fusedhead.rewrite import forward_gradients, returned_logits, returned_stacks, token_programs
from fusedhead.rewrite.returned_logits import Wrap, at_once, nested, unwrapped
from fusedhead.rewrite.statistics import count_elsewhere, fuse

BOTH_MODES = "its region is run without recording gradients too"


class Body(NamedTuple):
    """One graph of a module, and how it is run."""

    module: GraphModule
    owner: str  # the name of the higher-order op that runs it, "" for the graph itself
    grad: bool | None  # whether gradients are recorded where it is run; None for both
    calls: tuple[Node, ...] = ()  # the nodes that run it


def bodies(gm: GraphModule) -> list[Body]:
    """The graph of a module and those that its nodes run, each once."""
    found: dict[GraphModule, Body] = {}

    def visit(module: GraphModule, owner: str, grad: bool | None, call: Node | None = None) -> None:
        known = found.get(module)
        calls = (*(known.calls if known else ()), *([call] if call is not None else ()))
        if known is not None and known.grad == grad:
            found[module] = known._replace(calls=calls)
            return
        found[module] = Body(module, owner, grad if known is None else None, calls)
        modes = grad_modes(module.graph, grad is not False)
        for node in module.graph.nodes:
            part = getattr(module, str(node.target), None) if node.op == "get_attr" else None
            if isinstance(part, GraphModule):
                for user in node.users:
                    visit(part, name_of(user), modes[user] if grad is not None else None, user)

    visit(gm, "", torch.is_grad_enabled())
    return list(found.values())


class Needless(Exception):
    """What was done for the sake of heads that are then not fused: two products, or an opened checkpoint."""


class Grows(Exception):
    """Heads that were fused and would hold more than their logits: ``reasons`` by the names of their products."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(", ".join(reasons))
        self.reasons = reasons


def fuse_graph(
    gm: GraphModule, options: Options, *, twice: bool = True, left: Mapping[str, str] = profitability.EMPTY
) -> tuple[Report, Wrap]:
    """Fuse every provable head of ``gm`` in place.

    Returns the report and a function to put around the compiled graph (it restores outputs that were redirected).
    ``twice``: whether logits that are read both ways may get two products, and a checkpoint that holds a head alone
    be opened; raises Needless where that does not pay. ``left``: products to be left, and why; raises Grows for more.
    """
    started = time.perf_counter()
    report = Report(graphs=1)
    wrap: Wrap = unwrapped
    changed = False
    report.heads += inline_regions.inline(gm, torch.is_grad_enabled())
    taken_out = inline_checkpoints.open_heads(gm) if twice else []
    deferred = options.logits == "deferred" and not sharding.given_back(gm.graph)
    for module, owner, grad, calls in bodies(gm):
        expand_broadcasts.separate(module.graph)
        functionalize_accumulation.separate(module.graph)
        functionalize_subscripts.separate(module.graph)
        expand_soft_labels.separate(module.graph)
        deduplicate_weights.join(module.graph)
        merge_chunks.join(module.graph)
        products = duplicate_transposed.separate(module.graph) if twice else []
        apart = unstack_heads.separate(module.graph) if owner == "" else None
        if owner == "" and deferred:
            stacked, outside = returned_stacks.separate(module.graph, options)
            report.heads += stacked
            apart = nested(apart, outside)
            changed |= outside is not None
        wrap = apart or wrap
        alone = heads_without_loss(module.graph) if owner == "" and options.logits == "deferred" else set()
        reading = strategies.chosen(module.graph, candidates(module.graph) | alone, grad is not False)
        not_read = unread(module.graph, reading)
        report.heads += not_read.values()
        records: list[HeadRecord] = []
        wrapped = None
        if not reading.sites and owner == "":
            records += unlisted(module.graph, reading, not_read, lambda site: "", options)
        if reading.sites:
            records, wrapped = fuse_body(
                module.graph, reading, owner, options, alone, grad, deferred, not_read, left, calls
            )
        if duplicate_transposed.left(products):
            raise Needless
        report.heads += records
        wrap = nested(apart, wrapped) or wrap
        if any(record.fused for record in records):
            module.graph.lint()
            module.recompile()
            changed = True
    if duplicate_transposed.left(taken_out):
        raise Needless
    if changed:
        gm.recompile()
    for head in report.heads:
        head.run.graph = report.run
    report.milliseconds = (time.perf_counter() - started) * 1e3
    return report, wrap if deferred else at_once(wrap)


def fuse_body(
    graph: Graph,
    reading: Reading,
    owner: str,
    options: Options,
    alone: set[Node],
    grad: bool | None,
    deferred: bool = False,
    not_read: Collection[Node] | None = None,
    left: Mapping[str, str] = profitability.EMPTY,
    calls: Sequence[Node] = (),
) -> tuple[list[HeadRecord], Wrap | None]:
    """Decide and rewrite the sites of one graph; ``alone`` are projections to be deferred without a loss.

    ``not_read``: projections that the report has said of that they could not be read; None where products that might
    be heads are not asked for. ``left``: as in `fuse_graph`. ``calls``: the nodes that run the graph.
    """
    first = min(product for site in reading.sites for product in site.head.products)  # type: ignore[type-var]
    modes, mutations = grad_modes(graph, grad is not False), Mutations(graph, grad is not False, first, calls)
    found = token_regions.regions(reading)
    met = {head: region for region in found for head in region.heads}
    decided = decide(graph, reading, met, options, mutations, modes, owner, alone, deferred, left)
    records: list[HeadRecord] = []
    if not_read is not None and owner == "":
        listed = {*not_read, *(node for site, _ in decided for node in (site.head.node, *site.head.products))}
        why_kept = partial(why_returned, mutations=mutations, modes=modes, owner=owner, deferred=deferred)
        records += unlisted(graph, reading, listed, why_kept, options)
    products = products_of(graph)  # while all are there
    places = {site.head: place(site.head.node, products) for site, _ in decided}
    recipes = []
    least = profitability.limits(reading.sites, options.min_logits, options.budget)
    slots: list[Any] = list(graph.output_node().args[0]) if owner == "" else []  # type: ignore[arg-type]
    for site, reason in decided:
        if not reason:
            recipes += [
                replace(
                    returned_logits.recipe(site, i, n, logits_of(reading.values[n]).class_dim),
                    least=least(site),
                    runs=(site.run,),
                )
                for i, n in enumerate(slots)
                if n in set(site.outputs)
            ]
    wrap = returned_logits.redirect(graph, recipes) if recipes else None
    recomputed = "inside a checkpointed region" if owner in CHECKPOINTS else BOTH_MODES if grad is None else ""
    refused = {site.head for site, reason in decided if reason}
    kept = [region for region in found if not region.heads & refused]
    followed = {*reading.values, *reading.rowwise, *(node for site in reading.sites for node, _ in site.terminals)}
    count_elsewhere(graph, [site for site, reason in decided if not reason], modes)
    by_rows = [token_programs.fuse(graph, region, options.budget, modes, mutations.places, followed) for region in kept]
    token_regions.erase_unused(reading, {site.head for site, reason in decided if not reason})
    prices: dict[Projection, list[Price]] = {site.head: [] for site, _ in decided}
    for calls, heads in fuse(graph, [site for site, reason in decided if not reason], options.budget, modes, mutations):
        price = priced(calls[0], options.budget)  # reads the call, which an upgrade replaces
        why = recomputed or forward_gradients.upgrade(*calls, places=mutations.places)
        for head in dict.fromkeys(heads):
            prices[head].append(price(why))
    for region, made in zip(kept, by_rows):
        found_prices = [
            row_priced(call, options.budget)(recomputed or forward_gradients.upgrade_rows(call, mutations.places))
            for call in made
        ]
        for head in region.heads:
            prices[head] = [*found_prices, *prices[head]]
    profitability.limit(graph, options.min_logits, options.budget)
    grows: dict[str, str] = {}
    for site, reason in decided:
        found_prices = [] if reason else prices[site.head] or [asked_outside(site, options.budget)]
        record = describe(site, reason, places[site.head], found_prices, deferred, met.get(site.head), least(site))
        records.append(record)
        if too_much := profitability.grown(record, options.min_logits):
            grows[site.head.node.name] = too_much
    for site, _ in decided:  # the records and recipes have it: compilers copy what a node carries
        site.head.node.meta.pop(RUN, None)
    if grows.keys() - left.keys():
        raise Grows(grows)
    return records, wrap

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

from fusedhead import (
    accumulations,
    both_ways,
    broadcasts,
    linear_tail,
    opened,
    pieces,
    readings,
    regions,
    repeats,
    returned,
    returned_stacks,
    row_emission,
    row_region,
    sharded,
    size_gate,
    soft_labels,
    subscripts,
    unstacked,
)
from fusedhead.anchors import candidates
from fusedhead.decisions import decide, why_returned
from fusedhead.interpret import RUN, Reading
from fusedhead.lone_heads import heads_without_loss
from fusedhead.modes import grad_modes
from fusedhead.opened import CHECKPOINTS
from fusedhead.options import Options
from fusedhead.read import name_of
from fusedhead.records import Price, asked_outside, describe, priced, row_priced
from fusedhead.report import HeadRecord, Report
from fusedhead.returned import Wrap, at_once, nested, unwrapped
from fusedhead.rewrite import fuse
from fusedhead.safety import Mutations
from fusedhead.sources import place, products_of
from fusedhead.unlisted import unlisted
from fusedhead.unread import unread
from fusedhead.values import Projection, logits_of

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
    gm: GraphModule, options: Options, *, twice: bool = True, left: Mapping[str, str] = size_gate.EMPTY
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
    report.heads += regions.inline(gm)
    taken_out = opened.open_heads(gm) if twice else []
    deferred = options.logits == "deferred" and not sharded.given_back(gm.graph)
    for module, owner, grad, calls in bodies(gm):
        broadcasts.separate(module.graph)
        accumulations.separate(module.graph)
        subscripts.separate(module.graph)
        soft_labels.separate(module.graph)
        repeats.join(module.graph)
        pieces.join(module.graph)
        products = both_ways.separate(module.graph) if twice else []
        apart = unstacked.separate(module.graph) if owner == "" else None
        if owner == "" and deferred:
            stacked, outside = returned_stacks.separate(module.graph, options)
            report.heads += stacked
            apart = nested(apart, outside)
            changed |= outside is not None
        wrap = apart or wrap
        alone = heads_without_loss(module.graph) if owner == "" and options.logits == "deferred" else set()
        reading = readings.chosen(module.graph, candidates(module.graph) | alone, grad is not False)
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
        if both_ways.left(products):
            raise Needless
        report.heads += records
        wrap = nested(apart, wrapped) or wrap
        if any(record.fused for record in records):
            module.graph.lint()
            module.recompile()
            changed = True
    if both_ways.left(taken_out):
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
    left: Mapping[str, str] = size_gate.EMPTY,
    calls: Sequence[Node] = (),
) -> tuple[list[HeadRecord], Wrap | None]:
    """Decide and rewrite the sites of one graph; ``alone`` are projections to be deferred without a loss.

    ``not_read``: projections that the report has said of that they could not be read; None where products that might
    be heads are not asked for. ``left``: as in `fuse_graph`. ``calls``: the nodes that run the graph.
    """
    first = min(product for site in reading.sites for product in site.head.products)  # type: ignore[type-var]
    modes, mutations = grad_modes(graph, grad is not False), Mutations(graph, grad is not False, first, calls)
    found = row_region.regions(reading)
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
    least = size_gate.limits(reading.sites, options.min_logits, options.budget)
    slots: list[Any] = list(graph.output_node().args[0]) if owner == "" else []  # type: ignore[arg-type]
    for site, reason in decided:
        if not reason:
            recipes += [
                replace(
                    returned.recipe(site, i, n, logits_of(reading.values[n]).class_dim),
                    least=least(site),
                    runs=(site.run,),
                )
                for i, n in enumerate(slots)
                if n in set(site.outputs)
            ]
    wrap = returned.redirect(graph, recipes) if recipes else None
    recomputed = "inside a checkpointed region" if owner in CHECKPOINTS else BOTH_MODES if grad is None else ""
    refused = {site.head for site, reason in decided if reason}
    kept = [region for region in found if not region.heads & refused]
    followed = {*reading.values, *reading.rowwise, *(node for site in reading.sites for node, _ in site.terminals)}
    by_rows = [row_emission.fuse(graph, region, options.budget, modes, mutations.places, followed) for region in kept]
    row_region.erase_unused(reading, {site.head for site, reason in decided if not reason})
    prices: dict[Projection, list[Price]] = {site.head: [] for site, _ in decided}
    for calls, heads in fuse(graph, [site for site, reason in decided if not reason], options.budget, modes, mutations):
        price = priced(calls[0], options.budget)  # reads the call, which an upgrade replaces
        why = recomputed or linear_tail.upgrade(*calls, places=mutations.places)
        for head in dict.fromkeys(heads):
            prices[head].append(price(why))
    for region, made in zip(kept, by_rows):
        found_prices = [
            row_priced(call, options.budget)(recomputed or linear_tail.upgrade_rows(call, mutations.places))
            for call in made
        ]
        for head in region.heads:
            prices[head] = [*found_prices, *prices[head]]
    size_gate.limit(graph, options.min_logits, options.budget)
    grows: dict[str, str] = {}
    for site, reason in decided:
        found_prices = [] if reason else prices[site.head] or [asked_outside(site, options.budget)]
        record = describe(site, reason, places[site.head], found_prices, deferred, met.get(site.head), least(site))
        records.append(record)
        if too_much := size_gate.grown(record, options.min_logits):
            grows[site.head.node.name] = too_much
    for site, _ in decided:  # the records and recipes have it: compilers copy what a node carries
        site.head.node.meta.pop(RUN, None)
    if grows.keys() - left.keys():
        raise Grows(grows)
    return records, wrap

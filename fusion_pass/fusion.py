"""The pass: decides for every site of a Dynamo graph whether it is fused, and fuses it.

A site that is not proved equal stays as it is, with a sentence. `fuse_graph` edits the graph it is given and
returns what it did; it may raise, and the backend then falls back to a copy of the original.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from fusedhead import (
    accumulations,
    both_ways,
    joined,
    linear_tail,
    opened,
    pieces,
    readings,
    regions,
    returned,
    row_emission,
    row_region,
    sharded,
)
from fusedhead.aliases import storage, written
from fusedhead.anchors import candidates
from fusedhead.interpret import Reading, Site
from fusedhead.modes import grad_modes
from fusedhead.opened import CHECKPOINTS
from fusedhead.options import Options
from fusedhead.read import fake, hint, name_of, where
from fusedhead.records import describe, engine, planner, row_engine, tokens_of
from fusedhead.report import HeadRecord, Report
from fusedhead.rewrite import fuse
from fusedhead.row_region import Region
from fusedhead.safety import Mutations, functorch, leaves, subclass
from fusedhead.size_gate import gate, row_gate
from fusedhead.unread import unread
from fusedhead.values import Projection, logits_of

Wrap = Callable[[Callable[..., Any], returned.Finish], Callable[..., Any]]
RUN_AS_THEY_ARE = CHECKPOINTS | {"invoke_subgraph"}
BOTH_MODES = "its region is run without recording gradients too"


def unwrapped(compiled: Callable[..., Any], finish: returned.Finish) -> Callable[..., Any]:
    return compiled


def at_once(wrap: Wrap) -> Wrap:
    """The same, where returned logits are computed right behind the graph whatever the caller asks."""
    return lambda compiled, finish: wrap(compiled, returned.compute_now)


class Body(NamedTuple):
    """One graph of a module, and how it is run."""

    module: GraphModule
    owner: str  # the name of the higher-order op that runs it, "" for the graph itself
    grad: bool | None  # whether gradients are recorded where it is run; None for both


def bodies(gm: GraphModule) -> list[Body]:
    """The graph of a module and those that its nodes run, each once."""
    found: dict[GraphModule, Body] = {}

    def visit(module: GraphModule, owner: str, grad: bool | None) -> None:
        known = found.get(module)
        if known is not None and known.grad == grad:
            return
        found[module] = Body(module, owner, grad if known is None else None)
        modes = grad_modes(module.graph, grad is not False)
        for node in module.graph.nodes:
            part = getattr(module, str(node.target), None) if node.op == "get_attr" else None
            if isinstance(part, GraphModule):
                for user in node.users:
                    visit(part, name_of(user), modes[user] if grad is not None else None)

    visit(gm, "", torch.is_grad_enabled())
    return list(found.values())


class Needless(Exception):
    """What was done for the sake of heads that are then not fused: two products, or an opened checkpoint."""


def fuse_graph(gm: GraphModule, options: Options, *, twice: bool = True) -> tuple[Report, Wrap]:
    """Fuse every provable head of ``gm`` in place.

    Returns the report and a function to put around the compiled graph (it restores outputs that were redirected).
    ``twice``: whether logits that are read both ways may get two products, and a checkpoint that holds a head alone
    be opened; raises Needless where that does not pay.
    """
    started = time.perf_counter()
    report = Report(graphs=1)
    wrap: Wrap = unwrapped
    changed = False
    report.heads += regions.inline(gm)
    taken_out = opened.open_heads(gm) if twice else []
    deferred = options.logits == "deferred" and not sharded.given_back(gm.graph)
    for module, owner, grad in bodies(gm):
        accumulations.separate(module.graph)
        pieces.join(module.graph)
        products = both_ways.separate(module.graph) if twice else []
        apart = joined.separate(module.graph) if owner == "" else None
        wrap = apart or wrap
        alone = returned.heads_without_loss(module.graph) if owner == "" and options.logits == "deferred" else set()
        reading = readings.chosen(module.graph, candidates(module.graph) | alone, grad is not False)
        report.heads += unread(module.graph, reading)
        records: list[HeadRecord] = []
        wrapped = None
        if reading.sites:
            records, wrapped = fuse_body(module.graph, reading, owner, options, alone, grad, deferred)
        if both_ways.left(products):
            raise Needless
        report.heads += records
        wrap = joined.nested(apart, wrapped) or wrap
        if any(record.fused for record in records):
            module.graph.lint()
            module.recompile()
            changed = True
    if both_ways.left(taken_out):
        raise Needless
    if changed:
        gm.recompile()
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
) -> tuple[list[HeadRecord], Wrap | None]:
    """Decide and rewrite the sites of one graph; ``alone`` are projections to be deferred without a loss."""
    modes, mutations = grad_modes(graph, grad is not False), Mutations(graph, grad is not False)
    unsafe = functorch(graph) or higher_order(owner)
    decided = []
    with_loss = candidates(graph)
    too_small = gate(reading.sites, options.min_logits)
    found = row_region.regions(reading)
    met = {head: region for region in found for head in region.heads}
    for site in reading.sites:
        if not site.terminals and site.head not in met and (not site.escapes or site.head.node not in with_loss):
            if site.head.node in alone and not unsafe and returned_alone(site, mutations, modes):
                decided.append((site, too_small(site) or ("" if deferred else sharded.REASON)))
            continue
        company = [s for s in reading.sites if site.head in met and s.head in met[site.head].heads] or [site]
        small = too_small(site) if all(map(too_small, company)) else ""
        reason = unsafe or refusal(site, mutations, modes, owner, deferred) or small
        decided.append((site, reason))
    decided = together(decided, met, mutations, options)
    recipes = []
    slots: list[Any] = list(graph.output_node().args[0]) if owner == "" else []  # type: ignore[arg-type]
    for site, reason in decided:
        if not reason:
            recipes += [
                returned.recipe(site, i, n, logits_of(reading.values[n]).class_dim)
                for i, n in enumerate(slots)
                if n in set(site.outputs)
            ]
    wrap = returned.redirect(graph, recipes) if recipes else None
    recomputed = "inside a checkpointed region" if owner in CHECKPOINTS else BOTH_MODES if grad is None else ""
    records = []
    refused = {site.head for site, reason in decided if reason}
    kept = [region for region in found if not region.heads & refused]
    by_rows = [row_emission.fuse(graph, region, options.budget, modes, mutations) for region in kept]
    row_region.erase_unused(reading, {site.head for site, reason in decided if not reason})
    engines: dict[Projection, list[str]] = {site.head: [] for site, _ in decided}
    for calls, heads in fuse(graph, [site for site, reason in decided if not reason], options.budget, modes, mutations):
        planned = planner(calls[0], options.budget)  # reads the call, which an upgrade replaces
        why = recomputed or linear_tail.upgrade(*calls, places=mutations.places)
        for head in heads:
            engines[head].append(engine(planned, why))
    for region, made in zip(kept, by_rows):
        how = dict.fromkeys(row_engine(recomputed or linear_tail.upgrade_rows(call, mutations.places)) for call in made)
        for head in region.heads:
            engines[head] = [*how, *engines[head]]
    for site, reason in decided:
        record = describe(site, reason, "", deferred, met.get(site.head))
        if not reason:
            record.engine = ", ".join(dict.fromkeys(engines[site.head])) or "as the caller asks"
        records.append(record)
    return records, wrap


def together(
    decided: list[tuple[Site, str]], met: dict[Projection, Region], mutations: Mutations, options: Options
) -> list[tuple[Site, str]]:
    """The decisions, with heads that meet in a row program fused or refused together."""
    reasons = {site.head: reason for site, reason in decided}
    for region in dict.fromkeys(met.values()):
        why = next((reasons[head] for head in region.heads if reasons.get(head)), "")
        alone = [head for head in region.heads if head not in reasons]
        why = why or unsafe_rows(region, mutations) or ("a head it meets is not fused" if alone else "")
        if options.min_logits == "auto":
            why = why or row_gate([head.node for head in region.heads], options.budget)
        for head in region.heads:
            reasons[head] = reasons.get(head) or why
    return [(site, reasons[site.head]) for site, _ in decided]


def unsafe_rows(region: Region, mutations: Mutations) -> str:
    """Why a row program must not take the place of its nodes, or ""."""
    operands = leaves(x for head in region.heads for x in (head.hidden, head.weight))
    end = max((node for node, _ in region.results), key=mutations.position.__getitem__)
    first = min((head.node for head in region.heads), key=mutations.position.__getitem__)
    read = row_region.reads(region.outputs)
    devices = {v.device for v in map(fake, [*operands, *read]) if isinstance(v, torch.Tensor) and v.ndim}
    if len(devices) > 1:
        return f"its operands are on different devices ({', '.join(sorted(map(str, devices)))})"
    return mutations.between(first, end, operands) or mutations.anywhere_after(first, [*operands, *read]) or ""


def higher_order(owner: str) -> str | None:
    if owner == "" or owner in RUN_AS_THEY_ARE:
        return None
    return f"the head is inside {owner}"


def returned_alone(site: Site, mutations: Mutations, modes: dict[Node, bool]) -> bool:
    """Whether logits that the graph only returns are to be deferred."""
    if not site.outputs or site.escapes or not all(map(returned.rooted_in_inputs, leaves([site.head.weight]))):
        return False
    return not refusal(site, mutations, modes, "", True)


def refusal(site: Site, mutations: Mutations, modes: dict[Node, bool], owner: str, deferred: bool = False) -> str:
    """Why a site must stay as it is, or ""."""
    if site.escapes:
        node, sentence = site.escapes[0]
        return f"{sentence} (at {where(node)})"
    read = leaves(site.head.operands)
    begin = min(site.head.products, key=mutations.position.__getitem__)
    steps = [t.logits for _, t in site.terminals]
    vectors = leaves([c for s in steps for c in s.cols] + [r.value for s in steps for r in s.rows])
    indices = leaves([a for s in steps for step in s.row_steps for a in step.args])
    labels = leaves([p for _, t in site.terminals for p in (*t.label_sources, *t.sources)])
    reason = subclass(site, [*read, *vectors, *labels])
    if reason:
        return reason
    devices = {v.device for v in map(fake, [*read, *labels]) if isinstance(v, torch.Tensor)}
    if len(devices) > 1:
        return f"its operands are on different devices ({', '.join(sorted(map(str, devices)))})"
    if any(written_behind(site, output) for output in site.outputs):
        return "the returned logits are changed in place through another name"
    if site.outputs and owner:
        return f"the logits leave the region that is {'checkpointed' if owner in CHECKPOINTS else 'compiled once'}"
    few = (hint(tokens_of(site)) or 0) < returned.LEAST_TOKENS
    if site.outputs and not modes[site.head.node] and (few or not deferred):
        return "the logits are returned and no gradient is recorded, so building them once is the cheapest"
    if site.terminals:
        end = max((node for node, _ in site.terminals), key=mutations.position.__getitem__)
        reason = mutations.between(begin, end, [*read, *vectors, *indices])
        if reason:
            return reason
        first = min((node for node, _ in site.terminals), key=mutations.position.__getitem__)
        reason = mutations.between(first, end, labels)
        if reason:
            return reason
    for output in site.outputs:
        making, sources = returned.program_of([output], returned.followed(site))  # they are read when the graph has run
        reason = mutations.anywhere_after(making[0], sources)
        if reason:
            return reason
        if fake(output).requires_grad and len({modes[node] for node in making}) > 1:
            return "the returned logits are made partly with and partly without gradients recorded"
    if site.outputs:
        return mutations.anywhere_after(begin, [*read, *vectors, *indices]) or ""
    if any(isinstance(fake(node), torch.Tensor) and fake(node).requires_grad for node in read):
        # the backward reads both operands again, where eager code may need only one of them
        return mutations.anywhere_after(begin, read) or ""
    return ""


def written_behind(site: Site, output: Node) -> bool:
    """Whether memory that a returned tensor is made of is written by a node that is no part of its making."""
    making = returned.program_of([output], returned.followed(site))[0]
    memory = {storage(fake(node)) for node in making}
    others = set(site.followed).difference(making)
    return any(storage(fake(target)) in memory for node in others for target in written(node))

"""Which sites of a reading are fused, and why the others stay as they are.

A site that is not proved equal to what the program computes stays, with a sentence; so does one that is too small to
pay. Heads that meet in a row program are fused or refused together. This file decides and edits nothing; it must not
know how a site is fused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.fx import Graph, Node

from fusedhead.analysis import token_regions
from fusedhead.analysis.interpreter import Reading, Site
from fusedhead.analysis.projections import candidates
from fusedhead.analysis.token_regions import Region
from fusedhead.canonicalize.inline_checkpoints import CHECKPOINTS
from fusedhead.graph.aliases import memory
from fusedhead.graph.effects import memory_written
from fusedhead.graph.nodes import fake, most, name_of, where
from fusedhead.graph.weight_recipes import made_of_inputs
from fusedhead.ir.expr import nodes_of
from fusedhead.ir.logits import Projection
from fusedhead.legality import sharding
from fusedhead.legality.checks import Mutations, functorch, subclass
from fusedhead.legality.profitability import gate, row_gate
from fusedhead.options import Options
from fusedhead.report.records import tokens_of
from fusedhead.rewrite import returned_logits
from fusedhead.rewrite.statistics import PURE_VIEWS

RUN_AS_THEY_ARE = CHECKPOINTS | {"invoke_subgraph"}


def decide(
    graph: Graph,
    reading: Reading,
    met: dict[Projection, Region],
    options: Options,
    mutations: Mutations,
    modes: dict[Node, bool],
    owner: str,
    alone: set[Node],
    deferred: bool,
    left: Mapping[str, str],
) -> list[tuple[Site, str]]:
    """The sites worth a record, each with the reason for which it stays, "" where it is fused.

    ``met``: the heads that meet in row programs. ``modes``: where gradients are recorded. ``owner``: the higher-order
    op that runs the graph, "" for none. ``alone``: projections to be deferred without a loss, if logits are
    ``deferred`` at all. ``left``: products that were found to hold more fused, and why they stay.
    """
    unsafe = functorch(graph) or higher_order(owner)
    decided = []
    with_loss = candidates(graph)
    too_small = gate(reading.sites, options.min_logits, left)
    for site in reading.sites:
        if not site.terminals and site.head not in met and (not site.escapes or site.head.node not in with_loss):
            if site.head.node in alone and not unsafe and returned_alone(site, mutations, modes):
                decided.append((site, too_small(site) or ("" if deferred else sharding.REASON)))
            continue
        company = [s for s in reading.sites if site.head in met and s.head in met[site.head].heads] or [site]
        small = too_small(site) if all(map(too_small, company)) else ""
        reason = unsafe or refusal(site, mutations, modes, owner, deferred) or small
        decided.append((site, reason))
    return together(decided, met, mutations, options)


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
    operands = nodes_of(x for head in region.heads for x in (head.hidden, head.weight))
    end = max((node for node, _ in region.results), key=mutations.position.__getitem__)
    first = min((head.node for head in region.heads), key=mutations.position.__getitem__)
    read = token_regions.reads(region.outputs)
    return (
        on_several_devices(node for node in [*operands, *read] if getattr(fake(node), "ndim", 0))
        or mutations.between(first, end, operands)
        or mutations.anywhere_after(first, [*operands, *read])
        or ""
    )


def on_several_devices(nodes: Iterable[Node]) -> str:
    devices = {value.device for value in map(fake, nodes) if isinstance(value, torch.Tensor)}
    return f"its operands are on different devices ({', '.join(sorted(map(str, devices)))})" if len(devices) > 1 else ""


def higher_order(owner: str) -> str | None:
    if owner == "" or owner in RUN_AS_THEY_ARE:
        return None
    if owner == "autograd_function_apply":
        return (
            f"the head is inside {owner}, a torch.autograd.Function with a backward of its own: it is already fused by "
            "hand, and stays as it is written"
        )
    return f"the head is inside {owner}"


def returned_alone(site: Site, mutations: Mutations, modes: dict[Node, bool]) -> bool:
    """Whether logits that the graph only returns are to be deferred."""
    if not site.outputs or site.escapes or not returned_logits.makes_its_weight_again(site):
        return False
    return not refusal(site, mutations, modes, "", True)


def why_returned(site: Site, mutations: Mutations, modes: dict[Node, bool], owner: str, deferred: bool) -> str:
    """Why logits that a graph only returns are not deferred, in a sentence."""
    made = next((node for node in returned_logits.weights_of(site) if made_of_inputs(node) is None), None)
    while made is not None and name_of(made) in PURE_VIEWS:
        below = next((source for source in made.all_input_nodes if made_of_inputs(source) is None), None)
        if below is None:
            break
        made = below
    return (
        refusal(site, mutations, modes, owner, deferred)
        or (f"its weight is made in the graph ({name_of(made)} at {where(made)})" if made is not None else "")
        or "what is made of its logits is no loss and no statistic that is read, and they are not returned as they are"
    )


def refusal(site: Site, mutations: Mutations, modes: dict[Node, bool], owner: str, deferred: bool = False) -> str:
    """Why a site must stay as it is, or ""."""
    operands = nodes_of(site.head.operands)
    if site.escapes:
        node, sentence = site.escapes[0]
        return subclass(site, operands) or f"{sentence} (at {where(node)})"
    steps = [t.logits for _, t in site.terminals]
    vectors = nodes_of([c for s in steps for c in s.cols] + [r.value for s in steps for r in s.rows])
    labels = nodes_of([p for _, t in site.terminals for p in (*t.label_sources, *t.sources)])
    return (
        subclass(site, [*operands, *vectors, *labels])
        or on_several_devices([*operands, *labels])
        or kept_in_the_graph(site, modes, owner, deferred)
        or changed_too_early(site, mutations, modes, vectors, labels)
    )


def kept_in_the_graph(site: Site, modes: dict[Node, bool], owner: str, deferred: bool) -> str:
    """Why logits that a site returns must be made where they are, or ""."""
    if any(written_behind(site, output) for output in site.outputs):
        return "the returned logits are changed in place through another name"
    if site.outputs and owner:
        return f"the logits leave the region that is {'checkpointed' if owner in CHECKPOINTS else 'compiled once'}"
    few = most(tokens_of(site)) < returned_logits.LEAST_TOKENS
    if site.outputs and not modes[site.head.node] and (few or not deferred):
        return "the logits are returned and no gradient is recorded, so building them once is the cheapest"
    return ""


def changed_too_early(
    site: Site, mutations: Mutations, modes: dict[Node, bool], vectors: list[Node], labels: list[Node]
) -> str:
    """What is written before a fused head, its backward or its returned logits would read it, as a sentence, or ""."""
    operands = nodes_of(site.head.operands)
    indices = nodes_of([a for _, t in site.terminals for step in t.logits.row_steps for a in step.args])
    read = [*operands, *vectors, *indices]
    begin = min(site.head.products, key=mutations.position.__getitem__)
    terminals = sorted((node for node, _ in site.terminals), key=mutations.position.__getitem__)
    if terminals:
        reason = mutations.between(begin, terminals[-1], read) or mutations.between(terminals[0], terminals[-1], labels)
        if reason:
            return reason
    for output in site.outputs:
        # the sources are read when the graph has run
        making, sources = returned_logits.program_of([output], returned_logits.followed(site))
        reason = mutations.anywhere_after(making[0], sources)
        if reason:
            return reason
        from_logits = {site.head.node, *site.followed}.intersection(making)
        if fake(output).requires_grad and len({modes[node] for node in from_logits}) > 1:
            return "the returned logits are made partly with and partly without gradients recorded"
    # the backward reads again what eager code may not need: of two factors, where only one wants a gradient, one
    learning = any(isinstance(fake(node), torch.Tensor) and fake(node).requires_grad for node in read)
    reason = mutations.anywhere_after(begin, read) if site.outputs or learning else None
    if learning and terminals and not reason:
        reason = mutations.anywhere_after(terminals[0], labels)
    return reason or ""


def written_behind(site: Site, output: Node) -> bool:
    """Whether memory that a returned tensor is made of is written by a node that is no part of its making."""
    making = returned_logits.program_of([output], returned_logits.followed(site))[0]
    made_of = set().union(*map(memory, making))
    others = set(site.followed).difference(making)
    return any(not made_of.isdisjoint(memory_written(node)) for node in others)

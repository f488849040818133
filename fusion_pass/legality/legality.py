"""Legality: which sites of a reading may be rewritten, and why the others stay.

A site whose rewrite is not proved equal to the program stays, with a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.projections import candidates
from fusedhead.analysis.site import Decision, Site, head_nodes, tokens_of, weight_can_be_remade, weights_of
from fusedhead.graph.aliases import storages
from fusedhead.graph.dtensors import KEPT_SHARDS
from fusedhead.graph.effects import memory_written
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import fake, most, name_of, where
from fusedhead.graph.op_names import CHECKPOINTS, REMADE_FREELY
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.graph.recipes import LEAST_TOKENS, program_of
from fusedhead.graph.weight_recipes import made_of_inputs
from fusedhead.ir.expr import nodes_of
from fusedhead.ir.shards import sharded
from fusedhead.legality import shards
from fusedhead.legality.checks import functorch, subclass, written_after, written_between, written_unseen
from fusedhead.legality.reasons import Illegal, Unprofitable

RUN_AS_THEY_ARE = CHECKPOINTS | {"invoke_subgraph"}  # higher-order ops that only run their graph


def run(body: Body) -> None:
    """Decide on the sites with a loss, and on those whose logits are returned and deferred."""
    if not body.reading.sites:
        return
    body.facts.keep(min(product for site in body.reading.sites for product in site.head.products))  # type: ignore
    never = functorch(body.facts) or higher_order(body.owner)
    with_loss = candidates(body.facts)
    for site in body.reading.sites:
        in_a_program = site.head in body.regions
        if site.terminals or in_a_program or (site.escapes and site.head.node in with_loss):
            body.decisions.append(Decision(site, never or illegal(site, body)))
        elif site.head.node in body.returned and not never and may_be_deferred(site, body):
            body.decisions.append(Decision(site, None, deferred_only=True))


def higher_order(owner: str) -> Refusal | None:
    """Why no head in the graph of a higher-order op is fused; None if heads may be."""
    if owner == "" or owner in RUN_AS_THEY_ARE:
        return None
    if owner == "autograd_function_apply":
        return refuse(Illegal.AUTOGRAD_FUNCTION, owner=owner)
    return refuse(Illegal.HIGHER_ORDER, owner=owner)


def may_be_deferred(site: Site, body: Body) -> bool:
    """Whether logits that the graph only returns may be computed after it."""
    if not site.outputs or site.escapes or sharded(site.head) or not weight_can_be_remade(site):
        return False
    return not illegal(site, body, defers=True)


def why_not_deferred(site: Site, body: Body) -> Refusal:
    """Why logits that a graph only returns are not deferred."""
    maker = next((node for node in weights_of(site) if made_of_inputs(node) is None), None)
    while maker is not None and name_of(maker) in REMADE_FREELY:
        below = next((source for source in maker.all_input_nodes if made_of_inputs(source) is None), None)
        if below is None:
            break
        maker = below
    reason = illegal(site, body)
    if reason is None and maker is not None:
        reason = refuse(Illegal.WEIGHT_MADE_IN_GRAPH, name=name_of(maker), place=where(maker))
    return reason or refuse(Unprofitable.NO_LOSS)


def illegal(site: Site, body: Body, defers: bool | None = None) -> Refusal | None:
    """Why a site must stay, or None. ``defers``: whether its logits could be deferred."""
    if KEPT_SHARDS in site.head.node.meta:
        return site.head.node.meta[KEPT_SHARDS]  # type: ignore[no-any-return]
    operands = nodes_of(site.head.operands)
    if site.escapes:
        return subclass(site, operands) or site.escapes[0].placed()
    steps = [t.logits for _, t in site.terminals]
    vectors = nodes_of([c for s in steps for c in s.cols] + [r.value for s in steps for r in s.rows])
    labels = nodes_of([p for _, t in site.terminals for p in (*t.label_sources, *t.sources)])
    return (
        subclass(site, [*operands, *vectors, *labels])
        or shards.illegal_shards(site, body.regions)
        or on_several_devices([*operands, *labels])
        or must_materialise(site, body, body.defers if defers is None else defers)
        or mutated_operand(site, body.facts, vectors, labels)
        or mutated_value(site, body)
    )


def on_several_devices(nodes: Iterable[Node]) -> Refusal | None:
    devices = {value.device for value in map(fake, nodes) if isinstance(value, torch.Tensor)}
    names = ", ".join(sorted(map(str, devices)))
    return refuse(Illegal.SEVERAL_DEVICES, devices=names) if len(devices) > 1 else None


def must_materialise(site: Site, body: Body, defers: bool) -> Refusal | None:
    """Why logits that a site returns must be computed inside the graph, or None."""
    if any(aliased_write(site, output) for output in site.outputs):
        return refuse(Illegal.ALIASED_WRITE)
    if site.outputs and not body.is_top:
        what = "checkpointed" if body.owner in CHECKPOINTS else "compiled once"
        return refuse(Illegal.LEAVES_REGION, what=what)
    few = most(tokens_of(site)) < LEAST_TOKENS
    if site.outputs and not body.facts.grad_mode(site.head.node) and (few or not defers):
        return refuse(Unprofitable.BUILT_ONCE)
    return None


def mutated_value(site: Site, body: Body) -> Refusal | None:
    """A refusal if a value that a fused op replaces, or its result, is written without autograd seeing it."""
    region = body.regions.get(site.head)
    results = [*region.inside, *(node for node, _ in region.results)] if region else []
    values = [*site.head.products, *site.followed, *(node for node, _ in site.terminals), *results]
    begin = min(site.head.products, key=body.facts.position.__getitem__)
    return written_unseen(body.facts, begin, values)


def mutated_operand(site: Site, facts: GraphFacts, vectors: list[Node], labels: list[Node]) -> Refusal | None:
    """A refusal if an operand is written before a fused head, its backward or its returned logits read it."""
    operands = nodes_of(site.head.operands)
    indices = nodes_of([a for _, t in site.terminals for step in t.logits.row_steps for a in step.args])
    read = [*operands, *vectors, *indices]
    begin = min(site.head.products, key=facts.position.__getitem__)
    terminals = sorted((node for node, _ in site.terminals), key=facts.position.__getitem__)
    if terminals:
        reason = written_between(facts, begin, terminals[-1], read)
        reason = reason or written_between(facts, terminals[0], terminals[-1], labels)
        if reason:
            return reason
    for output in site.outputs:
        # Recipes read the sources after the graph.
        makers, sources = program_of([output], head_nodes(site))
        reason = written_after(facts, makers[0], sources)
        if reason:
            return reason
        from_logits = {site.head.node, *site.followed}.intersection(makers)
        if fake(output).requires_grad and len(set(map(facts.grad_mode, from_logits))) > 1:
            return refuse(Illegal.MIXED_GRAD_MODES)
    # The backward reads both factors again, while eager code needs only one where one factor wants a gradient.
    trains = any(isinstance(fake(node), torch.Tensor) and fake(node).requires_grad for node in read)
    reason = written_after(facts, begin, read) if site.outputs or trains else None
    if trains and terminals and not reason:
        reason = written_after(facts, terminals[0], labels)
    return reason


def aliased_write(site: Site, output: Node) -> bool:
    """Whether a node outside of a recipe writes to memory that the recipe reads."""
    makers = program_of([output], head_nodes(site))[0]
    memories = set().union(*map(storages, makers))
    others_followed = set(site.followed).difference(makers)
    return any(not memories.isdisjoint(memory_written(node)) for node in others_followed)

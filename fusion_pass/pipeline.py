"""The pipeline: the named passes in order, and the driver that runs them on every graph of a module.

A pass is a function of one `Body`. `fuse_module` runs the lists below on a copy of the module and returns the copy; it
may raise, and the backend then keeps the module as it was. Inductor's own graphs get passes too (`inductor.config`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.fx import GraphModule

from fusedhead.analysis import strategies, token_regions
from fusedhead.analysis.body import Body, graph_uses
from fusedhead.canonicalize import (
    deduplicate_weights,
    duplicate_transposed,
    expand_broadcasts,
    expand_soft_labels,
    functionalize_accumulation,
    functionalize_subscripts,
    inline_checkpoints,
    inline_regions,
    localize_shards,
    merge_chunks,
    unstack_heads,
)
from fusedhead.canonicalize.reasons import InShards
from fusedhead.graph.dtensors import SWEPT
from fusedhead.graph.edit import any_still_computed, copy_module, counting_edits
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.graph.recipes import Wrap, computed_at_once, unwrapped
from fusedhead.graph.tracing import Traces
from fusedhead.legality import (
    agreement,
    joint_decisions,
    legality,
    missed_heads,
    other_products,
    profitability,
    sharding,
)
from fusedhead.legality import returned_stacks as stack_legality
from fusedhead.options import Options
from fusedhead.report.records import records_of
from fusedhead.report.report import PassRecord, Report
from fusedhead.rewrite import (
    forward_gradients,
    order_collectives,
    returned_logits,
    returned_stacks,
    statistics,
    token_programs,
)


def anywhere(body: Body) -> bool:
    return True


def top(body: Body) -> bool:
    return body.is_top


def deferring_top(body: Body) -> bool:
    return body.is_top and body.defers


class Pass(NamedTuple):
    """One step over a body. A speculative pass is undone where its products are still computed."""

    name: str
    run: Callable[[Body], None]
    speculative: bool = False
    where: Callable[[Body], bool] = anywhere


MODULE_PASSES = (  # on the module's own graph, before the bodies
    Pass("inline-regions", inline_regions.run),
    Pass("inline-checkpoints", inline_checkpoints.run, speculative=True),
)
CANONICALIZE = (  # on each graph: exact rewrites that make heads visible
    Pass("localize-shards", localize_shards.run),
    Pass("expand-broadcasts", expand_broadcasts.run),
    Pass("functionalize-accumulation", functionalize_accumulation.run),
    Pass("functionalize-subscripts", functionalize_subscripts.run),
    Pass("expand-soft-labels", expand_soft_labels.run),
    Pass("deduplicate-weights", deduplicate_weights.run),
    Pass("merge-chunks", merge_chunks.run),
    Pass("duplicate-transposed", duplicate_transposed.run, speculative=True),
    Pass("unstack-heads", unstack_heads.run, where=top),
    Pass("find-returned-stacks", stack_legality.run, where=deferring_top),
    Pass("redirect-returned-stacks", returned_stacks.run, where=deferring_top),
)
ANALYZE = (  # tensors relative to heads
    Pass("find-projections", strategies.find_projections),
    Pass("interpret", strategies.run),
    Pass("missed-heads", missed_heads.run),
)
DECIDE = (  # whether a head may be rewritten, and whether it pays
    Pass("find-token-programs", token_regions.run),
    Pass("legality", legality.run),
    Pass("profitability", profitability.run),
    Pass("sharded-weights", sharding.run),
    Pass("joint-decisions", joint_decisions.run),
    Pass("other-products", other_products.run, where=top),
)
REWRITE = (
    Pass("note-lines", returned_logits.note_lines),
    Pass("redirect-returned-logits", returned_logits.run),
    Pass("count-tokens-elsewhere", statistics.count_elsewhere),
    Pass("emit-token-programs", token_programs.run),
    Pass("emit-statistics", statistics.run),
    Pass("gradients-in-forward", forward_gradients.run),
    Pass("limit-small-calls", profitability.limit_calls),
    Pass("find-grown-heads", profitability.find_grown_heads),
    Pass("find-heads-left-in-shards", localize_shards.find_left),
    Pass("order-collectives", order_collectives.run),
)
BODY_PASSES = (*CANONICALIZE, *ANALYZE, *DECIDE, *REWRITE)

Ran = Callable[[PassRecord, Body], None]  # told of every pass that ran


def run_passes(passes: Iterable[Pass], body: Body, *, speculate: bool = True, ran: Ran | None = None) -> None:
    """Run passes on a body in order, and call ``ran`` with the time and the number of edits of each."""
    for each in passes:
        if not each.where(body) or (each.speculative and not speculate):
            continue
        started, edits = time.perf_counter(), body.edits
        with counting_edits(body.graph, body.edited) as counted:
            each.run(body)
        if body.edits != edits or not counted:
            body.facts.refresh()
        if ran is not None:
            ran(PassRecord(each.name, body.edits - edits, (time.perf_counter() - started) * 1e3), body)


@dataclass(eq=False)
class Attempt:
    """One run of the passes over a module, in place."""

    gm: GraphModule
    options: Options
    speculate: bool
    excluded: Mapping[str, Refusal]  # products to be left, by name, and why
    report: Report = field(default_factory=lambda: Report(graphs=1))
    wrap: Wrap = unwrapped
    grown: Mapping[str, Refusal] = field(default_factory=dict)  # further products to be left
    speculation_failed: bool = False  # whether a product of a speculative pass is still computed

    def run(self, show: Ran | None) -> None:
        """Run all passes. Stops early where `grown` or `speculation_failed` asks for another attempt."""
        started = time.perf_counter()

        def ran(record: PassRecord, body: Body) -> None:
            self.report.passes.append(record)
            if show is not None:
                show(record, body)

        traces = Traces()
        module = Body(self.gm.graph, self.options, grad=torch.is_grad_enabled(), traces=traces)
        run_passes(MODULE_PASSES, module, speculate=self.speculate, ran=ran)
        self.report.heads += records_of(module)
        defers = self.options.logits == "deferred" and not sharding.frees_weights(self.gm.graph)
        changed = False
        for use in graph_uses(self.gm):
            graph, how = use.module.graph, (use.owner, use.grad, use.calls)
            body = Body(graph, self.options, *how, defers=defers, traces=traces, excluded=self.excluded)
            run_passes(BODY_PASSES, body, speculate=self.speculate, ran=ran)
            self.grown = {name: why for name, why in body.grown.items() if name not in self.excluded}
            self.speculation_failed = any_still_computed(body.speculated)
            if self.grown or self.speculation_failed:
                return
            self.report.heads += records_of(body)
            self.wrap = body.wrap or self.wrap
            if body.fused() or body.returned_stacks:
                graph.lint()
                use.module.recompile()
                changed = True
        self.speculation_failed = any_still_computed(module.speculated)
        if changed:
            self.gm.recompile()
        for head in self.report.heads:
            head.run.graph = self.report.run
        self.report.milliseconds = (time.perf_counter() - started) * 1e3
        if not defers:
            self.wrap = computed_at_once(self.wrap)


def left_by_ranks(attempt: Attempt) -> dict[str, Refusal]:
    """The products in shards that are not to be fused, since not every rank of their group fuses the same heads."""
    nodes = (node for use in graph_uses(attempt.gm) for node in use.module.graph.nodes)
    swept = [node.meta[SWEPT] for node in nodes if SWEPT in node.meta]
    left: dict[str, Refusal] = {}
    for group in dict.fromkeys(of for of, _, _ in swept):
        heads = [(product, facts) for of, product, facts in swept if of == group]
        wanted = attempt.options.shards
        if not agreement.agreed(group, "; ".join(facts for _, facts in heads), wanted):
            why = refuse(InShards.OTHER_RANKS) if wanted else refuse(InShards.NOT_ASKED)
            left |= {product: why for product, _ in heads}
    return left


def fuse_module(gm: GraphModule, options: Options, show: Ran | None = None) -> tuple[GraphModule, Report, Wrap]:
    """A copy of the module with every provable head fused, the report, and the wrap of the compiled graph.

    The passes start again on a fresh copy without the heads that are better left, and without the speculative passes
    where one of their products is still computed. ``show`` is called after every pass.
    """
    speculate, excluded = True, dict[str, Refusal]()
    while True:
        attempt = Attempt(copy_module(gm), options, speculate, excluded)
        attempt.run(show)
        if attempt.grown:
            excluded |= attempt.grown
        elif attempt.speculation_failed:
            speculate = False
        elif left := left_by_ranks(attempt):
            excluded |= left
        else:
            return attempt.gm, attempt.report, attempt.wrap

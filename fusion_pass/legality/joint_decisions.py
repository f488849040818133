"""Joint decisions: heads that meet in one token program are fused together or stay together."""

from __future__ import annotations

from fusedhead.analysis.body import Body
from fusedhead.analysis.site import Region
from fusedhead.analysis.token_regions import operands_from_outside
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import fake
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.ir.expr import nodes_of
from fusedhead.legality.checks import written_after, written_between
from fusedhead.legality.legality import on_several_devices
from fusedhead.legality.profitability import too_small_for_a_token_program
from fusedhead.legality.reasons import Illegal


def run(body: Body) -> None:
    """Give the heads of a token program one decision: the first reason that one of them has to stay."""
    if not body.regions:
        return
    reasons = {site.head: reason for site, reason, _ in body.decisions}
    for region in dict.fromkeys(body.regions.values()):
        reason = next((reasons[head] for head in region.heads if reasons.get(head)), None)
        undecided = any(head not in reasons for head in region.heads)
        reason = reason or illegal_region(region, body.facts) or (refuse(Illegal.COUPLED_HEAD) if undecided else None)
        if body.options.min_logits == "auto":
            products = [head.node for head in region.heads]
            reason = reason or too_small_for_a_token_program(products, body.options.budget)
        for head in region.heads:
            reasons[head] = reasons.get(head) or reason
    body.decisions = [decision._replace(reason=reasons[decision.site.head]) for decision in body.decisions]


def illegal_region(region: Region, facts: GraphFacts) -> Refusal | None:
    """Why a token program must not replace its nodes; None if it may."""
    operands = nodes_of(x for head in region.heads for x in (head.hidden, head.weight))
    end = max((node for node, _ in region.results), key=facts.position.__getitem__)
    first = min((head.node for head in region.heads), key=facts.position.__getitem__)
    outside = operands_from_outside(region.outputs)
    return (
        on_several_devices(node for node in [*operands, *outside] if getattr(fake(node), "ndim", 0))
        or written_between(facts, first, end, operands)
        or written_after(facts, first, [*operands, *outside])
    )

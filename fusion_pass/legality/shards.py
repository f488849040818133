"""Checks of a head whose vocabulary is sharded over ranks: the reasons why it stays.

A sharded head is fused where every statistic of its sweep can be merged over the ranks and all ranks have the same
rows.
"""

from __future__ import annotations

from collections.abc import Collection

from fusedhead.analysis.site import Site
from fusedhead.graph.nodes import fake
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.ir.expr import nodes_of
from fusedhead.ir.logits import Logits, Projection
from fusedhead.ir.shards import sharded, whole_vocab_of
from fusedhead.legality.reasons import Illegal
from fusedhead.lowering.shards import MERGED


def unserved(site: Site, by_tokens: Collection[Projection]) -> Refusal | None:
    """Why a sharded head is not fused, or None. ``by_tokens``: heads that a token program reads."""
    if not sharded(site.head):
        return None
    if whole_vocab_of(site.head.weight) is None or len(site.head.products) > 1:
        return refuse(Illegal.SHARDS_STACKED)
    if site.head in by_tokens:
        return refuse(Illegal.SHARDS_BY_TOKENS)
    if site.outputs:
        return refuse(Illegal.SHARDS_RETURNED)
    unmerged = {name for _, terminal in site.terminals for name in terminal.want}.difference(MERGED)
    if unmerged:
        return refuse(Illegal.SHARDS_STATISTIC, names=", ".join(sorted(unmerged)))
    return next(filter(None, (of_logits(terminal.logits) for _, terminal in site.terminals)), None)


def of_logits(logits: Logits) -> Refusal | None:
    if logits.vocab is not None:
        return refuse(Illegal.SHARDS_OF_A_PART)
    if nodes_of([step.args for step in logits.row_steps]):
        return refuse(Illegal.SHARDS_PICKED_ROWS)
    for col in logits.cols:
        if whole_vocab_of(col) is None and any(getattr(fake(node), "requires_grad", False) for node in nodes_of([col])):
            return refuse(Illegal.SHARDS_OF_A_VECTOR)
    return None

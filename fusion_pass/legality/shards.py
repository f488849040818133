"""Checks of a head whose vocabulary is sharded over ranks: the reasons why it stays.

Every statistic of a sweep can be merged over the ranks, so that a head is fused in shards where its rows are equal on
all of them.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

from fusedhead.analysis.site import Site
from fusedhead.graph.nodes import fake
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.ir.expr import nodes_of
from fusedhead.ir.logits import Logits, Projection
from fusedhead.ir.shards import sharded, whole_vocab_of
from fusedhead.legality.reasons import Illegal


def illegal_shards(site: Site, by_tokens: Collection[Projection]) -> Refusal | None:
    """Why a sharded head is not fused, or None. ``by_tokens``: heads that a token program reads."""
    if not sharded(site.head):
        return None
    if whole_vocab_of(site.head.weight) is None or len(site.head.products) > 1:
        return refuse(Illegal.SHARDS_STACKED)
    if site.head in by_tokens:
        return refuse(Illegal.SHARDS_BY_TOKENS)
    if site.outputs:
        return refuse(Illegal.SHARDS_RETURNED)
    weights = [weights for _, terminal in site.terminals for weights in nodes_of([terminal.weights])]
    if weights and gathered_head(site.head):
        return refuse(Illegal.SHARDS_OWN_VECTOR, name=weights[0].name)
    return next(filter(None, (of_logits(terminal.logits) for _, terminal in site.terminals)), None)


def of_logits(logits: Logits) -> Refusal | None:
    if logits.vocab is not None:
        return refuse(Illegal.SHARDS_OF_A_PART)
    if nodes_of([step.args for step in logits.row_steps]):
        return refuse(Illegal.SHARDS_PICKED_ROWS)
    vector = own_vector(logits)
    if vector is not None:
        return refuse(Illegal.SHARDS_OWN_VECTOR, name=vector.name)
    for col in logits.cols:
        if whole_vocab_of(col) is None and any(getattr(fake(node), "requires_grad", False) for node in nodes_of([col])):
            return refuse(Illegal.SHARDS_OF_A_VECTOR)
    return None


def gathered_head(head: Projection) -> bool:
    """Whether the program gathers the logits of all classes as a plain tensor, which each rank may use differently."""
    whole = whole_vocab_of(head.weight)
    return whole is not None and bool(whole.args[5])


def own_vector(logits: Logits) -> Node | None:
    """A vector that is combined with gathered logits and is no part of the head: it may differ from rank to rank."""
    vectors = [*(col for col in logits.cols if whole_vocab_of(col) is None), *(row.value for row in logits.rows)]
    return next(iter(nodes_of(vectors)), None) if gathered_head(logits.head) else None

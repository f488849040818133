"""One order for the collectives of heads in shards: each op takes the token of the one before it in the graph.

A compiler may reorder independent calls, by the sizes of their operands for example, and with uneven shards these
differ by rank. Ranks that issue collectives in different orders wait for each other for ever. The tokens make the calls
depend on each other, and their gradients order the collectives of the backward, the last one first.
"""

from __future__ import annotations

import itertools
import operator

import torch
from torch.fx import Node

import fusedhead.lowering.hidden_sum
import fusedhead.lowering.shard_loss
import fusedhead.lowering.token_shards  # noqa: F401  all register torch.ops.fusedhead
from fusedhead.analysis.body import Body
from fusedhead.graph.nodes import fake
from fusedhead.ir.builder import Emit, named

WITH_COLLECTIVES = ("shard_stats", "shard_loss", "gather_tokens", "hidden_sum")
COLLECTIVE = frozenset(getattr(torch.ops.fusedhead, name).default for name in WITH_COLLECTIVES)


def run(body: Body) -> None:
    """Give each op with a collective inside the token of the one before."""
    calls = [node for node in body.graph.nodes if node.target in COLLECTIVE]
    emit = Emit(body.graph) if len(calls) > 1 else None
    for call, following in itertools.pairwise(calls):
        assert emit is not None
        following.kwargs = {**following.kwargs, "after": token_of(emit, call, body.facts.grad_mode(call))}


def token_of(emit: Emit, call: Node, grad: bool) -> Node:
    """The last output of an op, which the next one is given."""
    with emit.before(call.next, call, grad=grad):
        return named(emit(operator.getitem, call, len(fake(call)) - 1), "token")

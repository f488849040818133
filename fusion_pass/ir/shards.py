"""Sharded heads: those whose weight is a ``whole_vocab`` call, which stands for the rows of all ranks."""

from __future__ import annotations

import torch
from torch.fx import Node

import fusedhead.lowering.shards  # noqa: F401  registers torch.ops.fusedhead.whole_vocab
from fusedhead.ir.expr import Plain, nodes_of
from fusedhead.ir.logits import Projection


def whole_vocab_of(ref: Plain) -> Node | None:
    """The ``whole_vocab`` call of a sharded weight or bias; None for one that is not sharded."""
    nodes = nodes_of([ref])
    return nodes[0] if len(nodes) == 1 and nodes[0].target is torch.ops.fusedhead.whole_vocab.default else None


def sharded(head: Projection) -> bool:
    return any(node.target is torch.ops.fusedhead.whole_vocab.default for node in nodes_of(head.operands))

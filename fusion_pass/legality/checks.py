"""Checks that make a readable site unsafe to rewrite: writes to its operands, functorch, tensor subclasses.

Each check returns a refusal or None. The rewrite reads h, W and the labels at another place of the graph than the
program, so that nothing may change them in between.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node

from fusedhead.analysis.projections import candidates
from fusedhead.analysis.site import Site
from fusedhead.compat import FakeTensor
from fusedhead.graph.aliases import storages
from fusedhead.graph.facts import GraphFacts, before
from fusedhead.graph.nodes import fake, name_of, where
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.legality.reasons import Illegal


def written_between(facts: GraphFacts, begin: Node, end: Node, read: Iterable[Node]) -> Refusal | None:
    """A refusal if memory of a tensor in ``read`` is written in [begin, end)."""
    write = facts.write_between(begin, end, read)
    if write is None:
        return None
    name, place = name_of(write.writer), where(write.writer)
    return refuse(Illegal.WRITTEN_BEFORE_LOSS, node=write.writer, name=name, place=place, tensor=write.tensor.name)


def written_after(facts: GraphFacts, begin: Node, read: Iterable[Node]) -> Refusal | None:
    """A refusal if memory of a tensor in ``read`` is written from ``begin`` on."""
    write = facts.write_after(begin, read)
    if write is None:
        return None
    name, place = name_of(write.writer), where(write.writer)
    return refuse(Illegal.WRITTEN, node=write.writer, name=name, place=place, tensor=write.tensor.name)


def written_unseen(facts: GraphFacts, begin: Node, values: Iterable[Node]) -> Refusal | None:
    """A refusal if memory of one of ``values`` is written through ``.data`` from ``begin`` on.

    Autograd does not see such a write. The program's backward then reads the new numbers of the ``values`` that it
    saved, and a fused op has saved none of them. (Any other write to a saved tensor is an error.)
    """
    views = [view for view in facts.data_views if before(begin, view)]
    reached = set[int]().union(*map(storages, values)) if views else set()
    for view in views:
        write = None if reached.isdisjoint(storages(view)) else facts.write_after(view, [view])
        if write is not None:
            name, place = name_of(write.writer), where(write.writer)
            return refuse(Illegal.WRITTEN_UNSEEN, node=write.writer, name=name, place=place)
    return None


def functorch(facts: GraphFacts) -> Refusal | None:
    """torch.func transforms need batching and double-backward rules that the fused ops do not have.

    A transform that is popped before the first head (a mask made with ``vmap``) does not matter.
    """
    heads = candidates(facts)
    depth, reached = 0, not heads
    for node in facts.graph.nodes:
        module = getattr(node.target, "__module__", None) or ""
        if node.op == "call_function" and "_functorch" in f"{module}.{node.target}":
            depth += ("increment_nesting" in name_of(node)) - ("decrement_nesting" in name_of(node))
            if reached:
                return refuse(Illegal.GRAPH_IN_TRANSFORM, name=name_of(node))
        if node in heads:
            reached = True
            if depth:
                return refuse(Illegal.HEAD_IN_TRANSFORM)
    return None


def subclass(site: Site, read: Iterable[Node]) -> Refusal | None:
    """Operands must be plain tensors: DTensor, quantised and other subclasses have semantics of their own."""
    for node in [*read, *site.followed]:
        value = fake(node)
        plain = type(value) in (FakeTensor, torch.nn.Parameter) or not isinstance(value, Tensor)
        if not plain or (isinstance(value, Tensor) and value.is_sparse):
            return refuse(Illegal.SUBCLASS, name=node.name, kind=type(value).__name__)
    return None

"""What makes a readable site unsafe to rewrite: writes to its operands, functorch, tensor subclasses.

Each check returns a sentence, or "" or None. The rewrite reads h, W and the labels at another place of the graph than
the program did; nothing may change them in between.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fusedhead.analysis.projections import candidates
from fusedhead.analysis.site import Site
from fusedhead.compat import FakeTensor
from fusedhead.graph.facts import GraphFacts, Write
from fusedhead.graph.nodes import fake, name_of, where


def written_between(facts: GraphFacts, begin: Node, end: Node, read: Iterable[Node]) -> str:
    """A sentence if memory of a tensor in ``read`` is written in [begin, end), else ""."""
    write = facts.write_between(begin, end, read)
    return f"{sentence(write)} before the loss" if write is not None else ""


def written_after(facts: GraphFacts, begin: Node, read: Iterable[Node]) -> str:
    """A sentence if memory of a tensor in ``read`` is written from ``begin`` on, else ""."""
    write = facts.write_after(begin, read)
    return sentence(write) if write is not None else ""


def sentence(write: Write) -> str:
    return f"{name_of(write.writer)} at {where(write.writer)} changes {write.tensor.name} in place"


def functorch(graph: Graph) -> str | None:
    """torch.func transforms need batching and double-backward rules that the fused ops do not have.

    A transform that is popped before the first head (a mask made with ``vmap``) does not matter.
    """
    heads = candidates(graph)
    depth, reached = 0, not heads
    for node in graph.nodes:
        module = getattr(node.target, "__module__", None) or ""
        if node.op == "call_function" and "_functorch" in f"{module}.{node.target}":
            depth += ("increment_nesting" in name_of(node)) - ("decrement_nesting" in name_of(node))
            if reached:
                return f"the graph is inside a torch.func transform ({name_of(node)})"
        if node in heads:
            reached = True
            if depth:
                return "the head is inside a torch.func transform"
    return None


def subclass(site: Site, read: Iterable[Node]) -> str | None:
    """Operands must be plain tensors: DTensor, quantised and other subclasses have semantics of their own."""
    for node in [*read, *site.followed]:
        value = fake(node)
        plain = type(value) in (FakeTensor, torch.nn.Parameter) or not isinstance(value, Tensor)
        if not plain or (isinstance(value, Tensor) and value.is_sparse):
            return f"{node.name} is a {type(value).__name__}, not a plain tensor"
    return None

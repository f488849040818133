"""Sites of small programs, and a builder at the end of their graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.site import Site
from fusedhead.ir.builder import Emit
from tests.analysis.bodies import body_of, plain_reading


def site_in(program: Callable[..., Any], *inputs: Any) -> tuple[Body, Site]:
    """The body of a program with one head, ready to be rewritten, and the head's site."""
    body = body_of(program, *inputs)
    (site,) = plain_reading(body).sites
    assert not site.escapes
    return body, site


@contextmanager
def emitting(graph: Graph, before: Node | None = None) -> Iterator[Emit]:
    """A builder that appends calls before a node, the output by default."""
    anchor = graph.output_node() if before is None else before
    emit = Emit(graph)
    with emit.before(anchor, anchor, grad=True):
        yield emit


def computed(graph: Graph, results: list[Any], *inputs: Tensor) -> list[Any]:
    """The values of some nodes of a graph that is run on inputs, given in the order in which the program reads them."""
    graph.output_node().args = (results,)
    graph.lint()
    return list(GraphModule(torch.nn.Module(), graph)(*inputs))

"""Bodies of small programs, as the passes of analysis meet them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusedhead.analysis.body import Body
from fusedhead.analysis.interpreter import interpret
from fusedhead.analysis.site import Reading
from fusedhead.analysis.strategies import find_projections
from fusedhead.options import Options
from tests.graph.dynamo import dynamo_graph


def body_of(program: Callable[..., Any], *inputs: Any) -> Body:
    """The body of a program's one graph, with the projections to follow."""
    body = Body(dynamo_graph(program, *inputs).graph, Options(min_logits=0))
    find_projections(body)
    return body


def plain_reading(body: Body, **how: Any) -> Reading:
    return interpret(body.facts, body.traces, body.starts, **how)

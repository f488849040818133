"""Lowers calls on deferred logits that no statistic answers: to a token program, or puts them off.

A result as wide as the logits is put off, since a later call usually reduces it to a few numbers. These are computed by
a token program over everything that leads to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.interpreter import heads_of
from fusedhead.analysis.site import Reading
from fusedhead.compat import PythonPrinter
from fusedhead.deferred.results import Size, TokenByToken, Wide
from fusedhead.deferred.to_fx import Draft
from fusedhead.graph.nodes import fake
from fusedhead.ir.logits import LOGITS_LIKE
from fusedhead.ir.tokenwise import TokenValue
from fusedhead.options import Options
from fusedhead.pipeline import DECIDE, REWRITE, run_passes

BUDGETS: dict[int, str | int] = {0: "auto", -1: "min"}


def token_by_token(
    draft: Draft, results: Sequence[Node], reading: Reading, memory: int, many: Callable[[list], Any] | None
) -> TokenByToken | Wide | None:
    """The outcome of a call that is no statistic of the rows, or None. ``draft`` is rewritten."""
    values = [reading.tokenwise.get(node, reading.values.get(node)) for node in results]
    if all(map(is_wide, values)):
        if any(escape.node not in results for site in reading.sites for escape in site.escapes):
            return None
        followed = all(isinstance(value, LOGITS_LIKE) for value in values)
        return Wide(None if followed else held(draft, reading, values))
    if any(map(is_wide, values)) or not all(node in reading.tokenwise for node in results):
        return None
    size = held(draft, reading, reading.tokenwise[results[0]])
    options = Options(logits="eager", min_logits=0, memory=BUDGETS.get(memory, memory))
    body = Body(draft.graph, options, grad=torch.is_grad_enabled(), reading=reading, reports_products=False)
    run_passes((*DECIDE, *REWRITE), body)
    if not body.decisions or len(body.fused()) < len(body.decisions):
        return None
    draft.graph.lint()
    return TokenByToken(GraphModule(torch.nn.Module(), draft.graph), many, size)


def is_wide(value: Any) -> bool:
    return isinstance(value, LOGITS_LIKE) or (isinstance(value, TokenValue) and not value.small)


def held(draft: Draft, reading: Reading, values: Any) -> Size:
    """The bytes of all logits that values are made of."""
    heads = heads_of(values)
    logits = [fake(site.head.node) for site in reading.sites if site.head in heads]
    total = sum(z.numel() * z.dtype.itemsize for z in logits)
    if not isinstance(total, torch.SymInt):
        return Size((), lambda: total)
    free = {str(symbol) for symbol in total.node.expr.free_symbols}
    return Size(*draft.function(PythonPrinter().doprint(total.node.expr), free))

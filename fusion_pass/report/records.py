"""Builds the report's record of each head: sizes, loss, engine and price."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from fusedhead.analysis.body import Body, Finding
from fusedhead.analysis.cost import sizes_of
from fusedhead.analysis.site import Decision, tokens_of
from fusedhead.analysis.source_lines import module_path
from fusedhead.graph.nodes import fake, hint
from fusedhead.ir.terminal import Kind
from fusedhead.report.head_record import HeadRecord


def records_of(body: Body) -> list[HeadRecord]:
    """The records of a graph: findings first, then decisions."""
    stacked = [record_of_decision(decision, body) for decision in body.returned_heads]
    findings = [record_of_finding(finding) for finding in body.findings]
    return [*stacked, *findings, *(record_of_decision(decision, body) for decision in body.decisions)]


def record_of_finding(finding: Finding) -> HeadRecord:
    """The record of a product that was not rewritten."""
    product, reason = finding.node, str(finding.reason or "")
    logits, hidden = fake(product), next((fake(n) for n in product.all_input_nodes), None)
    if not isinstance(logits, Tensor) or not isinstance(hidden, Tensor):  # the call of a region that holds it
        return HeadRecord(False, reason, finding.where, "", "?", 0, 0, "built", "", 0)
    sizes = [str(size) for size in logits.shape[:-1]]
    tokens = math.prod(map(int, sizes)) if all(map(str.isdigit, sizes)) else " x ".join(sizes)
    depth, vocab = (int(s) if str(s).isdigit() else 0 for s in (hidden.shape[-1], logits.shape[-1]))
    return HeadRecord(
        False, reason, finding.where, "", tokens, depth, vocab, "built", "",
        bytes_logits=(hint(logits.numel()) or 0) * logits.dtype.itemsize,
        dtype=str(logits.dtype).removeprefix("torch."), device=logits.device.type, module=module_path(product),
        source=product.meta.get("stack_trace") or "", likely=finding.likely,
    )  # fmt: skip


def record_of_decision(decision: Decision, body: Body) -> HeadRecord:
    """The record of a site, fused or left."""
    site, reason = decision.site, str(decision.reason or "")
    head, region = site.head, body.regions.get(site.head)
    vocab, hidden = head.weight.val.shape
    tokens = tokens_of(site)
    fused, count = not reason, hint(tokens) or 0
    prices = body.prices_of(site) if fused else []
    computed = [t.computes for _, t in site.terminals] + ([region.computes] if region else [])
    sizes = sizes_of(prices, count, int(vocab) * head.dtype.itemsize)
    products = 1 if all(price.forward_only for price in prices) else 3
    deferred = fused and bool(site.outputs) and body.defers
    return HeadRecord(
        fused=fused,
        reason=reason,
        where=body.lines[head],
        computes=", ".join(dict.fromkeys(computed)) or ("returned, deferred" if fused else ""),
        tokens=tokens if isinstance(tokens, int) else str(tokens),
        hidden_size=hidden,
        vocab_size=vocab,
        logits="never built" if fused and not site.outputs else "deferred" if deferred else "built",
        engine=", ".join(dict.fromkeys(price.engine for price in prices)),
        bytes_logits=sizes(count)[0],
        workspace_bytes=sizes(count)[1],
        flop=sum(price.plan(price.tokens)[1] for price in prices) or products * 2 * count * int(vocab) * int(hidden),
        forward_only=bool(prices) and all(price.forward_only for price in prices),
        gathers=any(t.kind is Kind.GATHER for _, t in site.terminals) or (region is not None and region.gathers),
        dtype=str(head.dtype).removeprefix("torch."),
        device=head.weight.val.device.type,
        module=module_path(head.node),
        source=head.node.meta.get("stack_trace") or "",
        least=body.least.get(head, 0),
        run=body.runs[head.node],
        sizes=sizes,
        tokens_of=None if isinstance(tokens, int) else counting(body.graph, tokens),
    )


def symbols(graph: Graph) -> dict[Any, int]:
    """The indices of the graph's inputs that are sizes, by their symbols."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    sizes = [(at, fake(node)) for at, node in enumerate(inputs) if isinstance(fake(node), torch.SymInt)]
    return {size.node.expr: at for at, size in sizes}


def counting(graph: Graph, tokens: torch.SymInt) -> Callable[[tuple[int, ...]], int] | None:
    """The number of tokens as a function of a call's sizes, in the order of `symbols`; None if it needs others."""
    expression, sizes = tokens.node.expr, list(symbols(graph))
    if not expression.free_symbols <= set(sizes):
        return None
    return lambda key: int(expression.subs(dict(zip(sizes, key))))

"""What the report says of a head: its sizes, what it computes, what computes it, at which price.

This file decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from fusedhead.analysis.interpreter import Site
from fusedhead.analysis.source_lines import module
from fusedhead.analysis.token_regions import Region
from fusedhead.graph.nodes import fake, hint
from fusedhead.ir.logits import Stack, leaves
from fusedhead.kernels.contract import Needs
from fusedhead.kernels.tokenwise.engine import operands
from fusedhead.kernels.tokenwise.program import read
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.kernels.transform.transform import parse
from fusedhead.lowering.checks import parse_stats
from fusedhead.lowering.plan.plan import Plan, plan
from fusedhead.lowering.plan.problem import Problem, writes_logits
from fusedhead.lowering.token_ops import windows_of
from fusedhead.report.report import HeadRecord
from fusedhead.rewrite.forward_gradients import NONE_NEEDED


class Price(NamedTuple):
    """What computes some heads together, and what that takes for so many tokens of theirs."""

    engine: str  # for people
    forward_only: bool
    plan: Callable[[int], tuple[int, int]]  # tokens of all heads together -> bytes of workspace, FLOP
    tokens: int  # of all of them, when the graph was compiled


def planner(call: Node, memory: int) -> Callable[[bool, int], Plan]:
    """What the planner will choose for a head's call, given "is the tail linear" and a number of tokens."""
    h, w, cols, rows = (fake(call.args[i]) for i in (0, 1, 3, 4))  # type: ignore[arg-type]
    needs = Needs(*(x.requires_grad for x in (h, w, cols, rows)))
    transform = parse(str(call.args[6]))
    products, explicit = product_dtype(h.dtype, w.device.type), writes_logits(parse_stats(str(call.args[7])), transform)
    vocab, hidden = (int(size) for size in w.shape)

    def planned(linear: bool, tokens: int) -> Plan:
        problem = Problem(
            tokens, vocab, hidden, h.dtype, w.device.type, products, needs, linear, True, explicit, transform
        )
        return plan(problem, memory=memory)

    return planned


def priced(call: Node, memory: int) -> Callable[[str], Price]:
    """The price of a head's call, once it is known ``why`` its gradients are not taken in the forward sweep."""
    planned, tokens = planner(call, memory), hint(fake(call.args[0]).shape[0]) or 0  # type: ignore[arg-type]

    def price(why: str) -> Price:
        def of(n: int) -> tuple[int, int]:
            chosen = planned(not why, n)
            return chosen.predicted_bytes, chosen.predicted_flop

        return Price(engine(planned(not why, tokens), why), why == NONE_NEEDED, of, tokens)

    return price


def engine(chosen: Plan, why: str) -> str:
    """What computes a head, and how, for people."""
    how = {"": "gradients in the forward sweep", NONE_NEEDED: "forward only"}
    return f"{chosen.engine.name}: {how.get(why, f'recompute in the backward ({why})')}"


def row_priced(call: Node, memory: int) -> Callable[[str], Price]:
    """The same for the call of a row program; ``why`` its gradients are not computed in the forward sweep."""
    given: Any = call.args[0]
    tensors: list[Any] = [fake(t) for t in given]
    program, heads = str(call.args[1]), operands(read(str(call.args[1])))
    tokens = hint(tensors[heads[0][0]].shape[0]) or 0
    product = 2 * sum(int(tensors[w].shape[0]) * int(tensors[w].shape[1]) for _, w in heads)  # FLOP of a token

    def price(why: str) -> Price:
        products = 1 if why == NONE_NEEDED else 4 if why else 3

        def of(n: int) -> tuple[int, int]:
            return windows_of(tensors, program, memory, n).predicted_bytes, products * product * n

        how = {"": ", with their gradients", NONE_NEEDED: ""}.get(why, f", again in the backward ({why})")
        text = f"row windows: the program's own ops on some tokens at a time{how}"
        return Price(text, why == NONE_NEEDED, of, tokens)

    return price


def asked_outside(site: Site, memory: int) -> Price:
    """What a loss that the caller takes of returned logits will take, if it takes one."""
    head = site.head
    vocab, hidden = (int(size) for size in head.weight.val.shape)
    h, w = (any(fake(node).requires_grad for node in leaves([x])) for x in (head.hidden, head.weight))
    needs = Needs(h, w, False, False)

    def of(n: int) -> tuple[int, int]:
        device = head.weight.val.device.type
        products = product_dtype(head.dtype, device)
        chosen = plan(Problem(n, vocab, hidden, head.dtype, device, products, needs), memory=memory)
        return chosen.predicted_bytes, chosen.predicted_flop

    return Price("as the caller asks", not any(needs), of, hint(tokens_of(site)) or 0)


def tokens_of(site: Site) -> Any:
    value = fake(site.head.node) if isinstance(site.head, Stack) else site.head.hidden.val
    shape = value.shape[:-1] if value.ndim else ()
    if site.terminals:
        logits = site.terminals[0][1].logits
        shape = [s for d, s in enumerate(logits.val.shape) if d != logits.class_dim]
    return math.prod(shape)


def describe(
    site: Site,
    reason: str,
    where: str,
    prices: Sequence[Price],
    deferred: bool = False,
    region: Region | None = None,
    least: int = 0,
) -> HeadRecord:
    """The record of a site: ``reason`` is "" where it was fused, and ``prices`` those of what computes it then.

    ``deferred``: returned logits are handed out deferred. ``region``: the row program that reads its logits.
    ``least``: calls of fewer logits build them.
    """
    vocab, hidden = site.head.weight.val.shape
    tokens = tokens_of(site)
    fused, count = not reason, hint(tokens) or 0
    computed = [t.computes for _, t in site.terminals] + ([region.computes] if region else [])
    sizes = sizes_of(prices, count, int(vocab) * site.head.dtype.itemsize)
    products = 1 if all(price.forward_only for price in prices) else 3
    return HeadRecord(
        fused=fused,
        reason=reason,
        where=where,
        computes=", ".join(dict.fromkeys(computed)) or ("returned, deferred" if fused else ""),
        tokens=tokens if isinstance(tokens, int) else str(tokens),
        hidden_size=hidden,
        vocab_size=vocab,
        logits=("never built" if fused and not site.outputs else "deferred" if fused and deferred else "built"),
        engine=", ".join(dict.fromkeys(price.engine for price in prices)) if fused else "",
        bytes_logits=sizes(count)[0],
        workspace_bytes=sizes(count)[1],
        flop=sum(price.plan(price.tokens)[1] for price in prices) or products * 2 * count * int(vocab) * int(hidden),
        forward_only=bool(prices) and all(price.forward_only for price in prices),
        dtype=str(site.head.dtype).removeprefix("torch."),
        device=site.head.weight.val.device.type,
        module=module(site.head.node),
        source=site.head.node.meta.get("stack_trace") or "",
        least=least,
        run=site.run,
        sizes=sizes,
        tokens_of=None if isinstance(tokens, int) else counting(site.head.node.graph, tokens),
    )


def sizes_of(prices: Sequence[Price], tokens: int, token_bytes: int) -> Callable[[int], tuple[int, int]]:
    """N -> bytes of a head's logits, and of the workspace that is held in their place.

    What computes several heads together is shared by their tokens; what is computed one after another is held apart.
    """

    def sizes(n: int) -> tuple[int, int]:
        held = 0.0
        for price in prices:
            total = max(1, round(n * price.tokens / tokens) if tokens else n)
            held = max(held, price.plan(total)[0] * min(1.0, n / total))
        return n * token_bytes, int(held)

    return sizes


def symbols(graph: Graph) -> dict[Any, int]:
    """The places of the graph's inputs that are sizes, by their symbols."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    sizes = [(at, fake(node)) for at, node in enumerate(inputs) if isinstance(fake(node), torch.SymInt)]
    return {size.node.expr: at for at, size in sizes}


def counting(graph: Graph, tokens: torch.SymInt) -> Callable[[tuple[int, ...]], int] | None:
    """The number of tokens as a function of a call's sizes, in the order of `symbols`; None where they do not tell."""
    expression, known = tokens.node.expr, list(symbols(graph))
    if not expression.free_symbols <= set(known):
        return None
    return lambda key: int(expression.subs(dict(zip(known, key))))

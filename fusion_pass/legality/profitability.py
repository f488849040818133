"""Heads too small to be worth fusing: they stay as they are, and the report says so.

Fused, a small head costs time: its windows are launched, or walked, one by one, where Inductor has a kernel. What it
saves, memory for [N, V], is then small as well. Where that turns:

| device | step time of a float32 head, fused over Inductor's, by logits                                       | from |
|--------|-----------------------------------------------------------------------------------------------------|------|
| CPU    | 2^11: 5.1, 2^13: 3.2-3.7, 2^15: 1.5-2.8, 2^17: 1.3-2.4, 2^19: 1.0-1.9, 2^20: 1.1-1.3, 2^22: 0.8-1.0 | 2^20 |
| CUDA   | below 2^22 the logits and their gradient, 16 MiB, lie in the second-level cache: no traffic to save  | 2^22 |

(one thread, D from 64 to 768, V from 128 to 50257, forward and backward.)

A size that is a symbol is another one in every call. A head that may be large is fused, and its op is told from how
many logits on: below, it builds them whole, in as few calls of torch as the plain program takes (`whole`). No
guard is added for it. This file knows sizes and nothing of rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fusedhead.analysis.interpreter import Site
from fusedhead.graph.nodes import fake, most
from fusedhead.ir.logits import Stack, leaves
from fusedhead.kernels.contract import Needs
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.kernels.torch_engine.whole import ALL
from fusedhead.lowering.engines import engine_for
from fusedhead.lowering.plan.plan import plan
from fusedhead.lowering.plan.problem import Problem
from fusedhead.lowering.plan.tokenwise import window_bytes
from fusedhead.lowering.token_ops import logits_bytes
from fusedhead.report.report import HeadRecord, mebibytes
from fusedhead.rules.table import Family

FAMILY = Family(
    "size",
    "2²⁰ logits and more, on CUDA 2²²; token by token, logits of 128 MiB and more, on CUDA 4 GiB",
    "smaller heads, and such as would hold more than their logits; each call decides where tokens are a symbol; "
    "`fusedhead.min_logits` moves the limit",
)
LEAST = {"cuda": 1 << 22}  # logits, by device
LEAST_ELSEWHERE = 1 << 20
MAY_HOLD = {"cuda": 1.5}  # of the bytes of the logits, elsewhere as much as they
EMPTY: Mapping[str, str] = {}
MOST_TOKENS = 1 << 24
WINDOWS = {"cuda": 2}  # of a row program, that its logits have to fill


def least_logits(device_type: str, min_logits: str | int) -> int:
    """From how many logits on a head is fused; ``min_logits`` is the option of that name."""
    return LEAST.get(device_type, LEAST_ELSEWHERE) if isinstance(min_logits, str) else min_logits


def grown(head: HeadRecord, min_logits: str | int) -> str:
    """Why a head that is fused is to be left after all, or "": its windows would hold more than its logits take.

    The number is the report's own. On CUDA some growth is paid for: at (2048, 4096, 32000) a step holds 157 MiB for the
    125 of the logits and takes 0.96 of Inductor's time. What the user has set counts logits alone, and where tokens are
    a symbol each call decides.
    """
    share = MAY_HOLD.get(head.device, 1.0)
    if min_logits != "auto" or head.least or head.materialised or head.workspace_bytes <= share * head.bytes_logits:
        return ""
    held, logits = mebibytes(head.workspace_bytes), mebibytes(head.bytes_logits)
    remedy = "with fusedhead.min_logits=0 it would be fused"
    return f"its windows would hold {held}, more than its logits, {logits} ({remedy})"


def gate(
    sites: Iterable[Site], min_logits: str | int, left: Mapping[str, str] = EMPTY
) -> Callable[[Site], str]:
    """A function that says why a site is too small, or "".

    Heads of one graph that share a weight count together: a loop over pieces of the tokens is one head. Of heads that
    are stacked each counts alone: it is swept alone. A symbol counts with the largest value that it may have.
    ``left``: what `grown` said of products, by their names.
    """
    count: Counter[tuple[Node, ...]] = Counter()
    for site in sites:
        parts = len(site.head.parts) if isinstance(site.head, Stack) else 1
        count[weight(site)] += most(fake(site.head.node).numel()) / parts  # type: ignore[assignment]

    def too_small(site: Site) -> str:
        least = least_logits(fake(site.head.node).device.type, min_logits)
        logits = count[weight(site)]
        if logits >= least:
            return left.get(site.head.node.name, "")
        return (
            f"its {logits:,.0f} logits are too few for fusing to pay (fewer than fusedhead.min_logits, {least:,}; "
            "with 0 it would be fused)"
        )

    return too_small


def row_gate(projections: Iterable[Node], memory: int) -> str:
    """Why the logits of heads that a row program computes are too few for it, or "".

    A row program saves memory and costs time: where its gradients are not known up to a factor, it multiplies again
    where Inductor reads logits again. Below its window, on CUDA twice that, there is little to save.
    """
    logits = [fake(node) for node in projections]
    held = sum(most(z.numel()) * z.dtype.itemsize for z in logits)
    least = rows_from(logits[0].device.type, memory)
    if held >= least:
        return ""
    return (
        f"what is made of its logits would be computed token by token, and they are too few for that to pay "
        f"({held / 2**20:,.1f} MiB, fewer than {least / 2**20:,.0f}; with fusedhead.min_logits=0 it would be fused)"
    )


def pays_from(h: Tensor, w: Tensor, min_logits: str | int, memory: int) -> int:
    """From how many logits on a call on ``h`` [N, D] and ``w`` [V, D] is to be fused, N a symbol.

    What both parts of the gate say of each N: of so many logits on, and none whose windows hold more than they take.
    """
    device = w.device.type
    least = least_logits(device, min_logits)
    vocab, hidden = w.shape
    if min_logits != "auto" or not isinstance(vocab, int) or not isinstance(hidden, int):
        return least
    needs, share = Needs(h.requires_grad, w.requires_grad, False, False), MAY_HOLD.get(device, 1.0)

    products = product_dtype(h.dtype, device)

    def grows(n: int) -> bool:
        problem = Problem(n, vocab, hidden, h.dtype, device, products, needs)
        held = plan(problem, memory=memory).predicted_bytes
        return held > share * n * vocab * h.dtype.itemsize

    low = high = max(1, -(-least // vocab))
    while grows(high) and high < MOST_TOKENS:
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if grows(middle) else (low, middle)
    return max(least, high * vocab) if high * vocab - least >= vocab else least


def limits(sites: Iterable[Site], min_logits: str | int, memory: int) -> Callable[[Site], int]:
    """A function that says of how many logits on a site is large; 0 where the gate has seen how many they are.

    Sites on one weight share the limit, as they do in `gate`.
    """
    sharing = Counter(weight(site) for site in sites)

    def least(site: Site) -> int:
        if isinstance(fake(site.head.node).numel(), int):
            return 0
        return pays_from(site.head.hidden.val, site.head.weight.val, min_logits, memory) // sharing[weight(site)]

    return least


def limit(graph: Graph, min_logits: str | int, memory: int) -> None:
    """Tell the ops of heads whose number of tokens is a symbol below how many logits they are to build them whole.

    Calls on one weight share the limit. Where a gradient takes a second op, those below it keep their product.
    """
    calls: dict[Any, list[Node]] = {}
    for op in (torch.ops.fusedhead.head_stats.default, torch.ops.fusedhead.head_loss.default):
        for call in graph.find_nodes(op="call_function", target=op):
            calls.setdefault(call.args[1], []).append(call)
    for sharing in calls.values():
        for call in sharing:
            h, w = fake(call.args[0]), fake(call.args[1])  # type: ignore[arg-type]
            if isinstance(h.shape[0] * w.shape[0], int):
                continue
            least = pays_from(h, w, min_logits, memory) // len(sharing)
            if not least:
                continue
            call.args = (*call.args, least)
            if call.target is torch.ops.fusedhead.head_stats.default and keeps_product(call):
                call.args = (*call.args, True)
    limit_rows(graph, min_logits, memory)


def keeps_product(call: Node) -> bool:
    """Whether a ``head_stats`` call is differentiated, and not by multiplying again."""
    h, w = fake(call.args[0]), fake(call.args[1])  # type: ignore[arg-type]
    engine = engine_for(h.dtype, h.device.type).for_few_logits
    return (
        counted(h.shape[0])
        and isinstance(w.shape[0], int)
        and engine is not None
        and engine.keeps_product
        and set(str(call.args[7]).split(",")) <= {*ALL, "lse_low"}
        and any(map(differentiable, call.users))
    )


def differentiable(node: Node) -> bool:
    """Whether a tensor's node has a gradient."""
    return isinstance(fake(node), Tensor) and fake(node).requires_grad


def counted(tokens: Any) -> bool:
    """Whether a number of tokens is a symbol that the caller's tensors give."""
    return isinstance(tokens, torch.SymInt) and not free_unbacked_symbols(tokens)


def limit_rows(graph: Graph, min_logits: str | int, memory: int) -> None:
    """Tell ``head_rows`` calls that are differentiated below how many bytes of logits they are to keep the products.

    Calls on one weight share the limit.
    """
    calls = graph.find_nodes(op="call_function", target=torch.ops.fusedhead.head_rows.default)
    sharing = Counter(call.args[0][1] for call in calls)
    for call in calls:
        tensors = [fake(t) for t in call.args[0]]
        each = logits_bytes(tensors, call.args[1])
        if not counted(tensors[0].shape[0]) or not isinstance(each, int) or not any(map(differentiable, call.users)):
            continue
        device = tensors[0].device.type
        least = rows_from(device, memory) if isinstance(min_logits, str) else min_logits * tensors[1].element_size()
        if least := least // sharing[call.args[0][1]]:
            call.args = (*call.args, least)


def rows_from(device_type: str, memory: int) -> int:
    """Bytes of logits from which on a row program pays."""
    return WINDOWS.get(device_type, 1) * window_bytes(device_type, memory)


def weight(site: Site) -> tuple[Node, ...]:
    return tuple(leaves([site.head.weight]))

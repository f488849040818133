"""Heads too small to be worth fusing: they stay as they are, and the report says so.

Fused, a small head costs time: its windows are launched, or walked, one by one, where Inductor has a kernel. What it
saves, memory for [N, V], is then small as well. Where that turns:

| device | step time of a float32 head, fused over Inductor's, by logits                                       | from |
|--------|-----------------------------------------------------------------------------------------------------|------|
| CPU    | 2^11: 5.1, 2^13: 3.2-3.7, 2^15: 1.5-2.8, 2^17: 1.3-2.4, 2^19: 1.0-1.9, 2^20: 1.1-1.3, 2^22: 0.8-1.0 | 2^20 |
| CUDA   | below 2^22 the logits and their gradient, 16 MiB, lie in the second-level cache: no traffic to save  | 2^22 |

(one thread, D from 64 to 768, V from 128 to 50257, forward and backward.)

A size that is a symbol is another one in every call. A head that may be large is fused, and its op is told from how
many logits on: below, it builds them whole, in as few calls of torch as the plain program takes (`torch_whole`). No
guard is added for it. This file knows sizes and nothing of rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from fusedhead.interpret import Site
from fusedhead.lowering.row_plan import window_bytes
from fusedhead.read import fake, most
from fusedhead.rules.table import Family
from fusedhead.values import Stack, leaves

FAMILY = Family(
    "size",
    "2²⁰ logits and more, on CUDA 2²²; token by token, logits of 128 MiB and more, on CUDA 4 GiB",
    "smaller heads, where fusing costs time and saves little; `fusedhead.min_logits` moves the limit",
)
LEAST = {"cuda": 1 << 22}  # logits, by device
LEAST_ELSEWHERE = 1 << 20
WINDOWS = {"cuda": 2}  # of a row program, that its logits have to fill


def least_logits(device_type: str, min_logits: str | int) -> int:
    """From how many logits on a head is fused; ``min_logits`` is the option of that name."""
    return LEAST.get(device_type, LEAST_ELSEWHERE) if isinstance(min_logits, str) else min_logits


def gate(sites: Iterable[Site], min_logits: str | int) -> Callable[[Site], str]:
    """A function that says why a site is too small, or "".

    Heads of one graph that share a weight count together: a loop over pieces of the tokens is one head. Of heads that
    are stacked each counts alone: it is swept alone. A symbol counts with the largest value that it may have.
    """
    count: Counter[tuple[Node, ...]] = Counter()
    for site in sites:
        parts = len(site.head.parts) if isinstance(site.head, Stack) else 1
        count[weight(site)] += most(fake(site.head.node).numel()) / parts  # type: ignore[assignment]

    def too_small(site: Site) -> str:
        least = least_logits(fake(site.head.node).device.type, min_logits)
        logits = count[weight(site)]
        if logits >= least:
            return ""
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


def limits(sites: Iterable[Site], min_logits: str | int) -> Callable[[Site], int]:
    """A function that says of how many logits on a site is large; 0 where the gate has seen how many they are.

    Sites on one weight share the limit, as they do in `gate`.
    """
    sharing = Counter(weight(site) for site in sites)

    def least(site: Site) -> int:
        logits = fake(site.head.node)
        known = isinstance(logits.numel(), int)
        return 0 if known else least_logits(logits.device.type, min_logits) // sharing[weight(site)]

    return least


def limit(graph: Graph, min_logits: str | int) -> None:
    """Tell the ops of heads whose number of tokens is a symbol below how many logits they are to build them whole.

    Calls on one weight share the limit.
    """
    calls: dict[Any, list[Node]] = {}
    for op in (torch.ops.fusedhead.head_stats.default, torch.ops.fusedhead.head_loss.default):
        for call in graph.find_nodes(op="call_function", target=op):
            calls.setdefault(call.args[1], []).append(call)
    for sharing in calls.values():
        for call in sharing:
            h, w = fake(call.args[0]), fake(call.args[1])  # type: ignore[arg-type]
            least = least_logits(h.device.type, min_logits) // len(sharing)
            if least and not isinstance(h.shape[0] * w.shape[0], int):
                call.args = (*call.args, least)


def rows_from(device_type: str, memory: int) -> int:
    """Bytes of logits from which on a row program pays."""
    return WINDOWS.get(device_type, 1) * window_bytes(device_type, memory)


def weight(site: Site) -> tuple[Node, ...]:
    return tuple(leaves([site.head.weight]))

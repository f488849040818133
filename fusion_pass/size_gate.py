"""Heads too small to be worth fusing: they stay as they are, and the report says so.

Fused, a small head costs time: its windows are launched, or walked, one by one, where Inductor has a kernel. What it
saves, memory for [N, V], is then small as well. Where that turns:

| device | step time of a float32 head, fused over Inductor's, by logits                                       | from |
|--------|-----------------------------------------------------------------------------------------------------|------|
| CPU    | 2^11: 5.1, 2^13: 3.2-3.7, 2^15: 1.5-2.8, 2^17: 1.3-2.4, 2^19: 1.0-1.9, 2^20: 1.1-1.3, 2^22: 0.8-1.0 | 2^20 |
| CUDA   | below 2^22 the logits and their gradient, 16 MiB, lie in the second-level cache: no traffic to save  | 2^22 |

(one thread, D from 64 to 768, V from 128 to 50257, forward and backward.) This file knows sizes and nothing of rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from torch.fx import Node

from fusedhead.interpret import Site
from fusedhead.lowering.row_plan import window_bytes
from fusedhead.read import fake, hint
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


def gate(sites: Iterable[Site], min_logits: str | int) -> Callable[[Site], str]:
    """A function that says why a site is too small, or "".

    Heads of one graph that share a weight count together: a loop over pieces of the tokens is one head. Of heads that
    are stacked each counts alone: it is swept alone. Sizes that are symbols count with this compilation's values,
    without a guard; sizes that only the data decide are never too small.
    """
    count: Counter[tuple[Node, ...]] = Counter()
    unknown = set()
    for site in sites:
        logits = hint(fake(site.head.node).numel())
        count[weight(site)] += (logits or 0) // (len(site.head.parts) if isinstance(site.head, Stack) else 1)
        if logits is None:
            unknown.add(weight(site))

    def too_small(site: Site) -> str:
        least = LEAST.get(fake(site.head.node).device.type, LEAST_ELSEWHERE)
        least = least if isinstance(min_logits, str) else min_logits
        logits = count[weight(site)]
        if logits >= least or weight(site) in unknown:
            return ""
        return (
            f"its {logits:,} logits are too few for fusing to pay (fewer than fusedhead.min_logits, {least:,}; "
            "with 0 it would be fused)"
        )

    return too_small


def row_gate(projections: Iterable[Node], memory: int) -> str:
    """Why the logits of heads that a row program computes are too few for it, or "".

    A row program saves memory and costs time: where its gradients are not known up to a factor, it multiplies again
    where Inductor reads logits again. Below its window, on CUDA twice that, there is little to save.
    """
    logits = [fake(node) for node in projections]
    sizes = [(hint(z.numel()), z.dtype.itemsize) for z in logits]
    held = sum(numel * itemsize for numel, itemsize in sizes if numel is not None)
    least = rows_from(logits[0].device.type, memory)
    if held >= least or any(numel is None for numel, _ in sizes):
        return ""
    return (
        f"what is made of its logits would be computed token by token, and they are too few for that to pay "
        f"({held / 2**20:,.1f} MiB, fewer than {least / 2**20:,.0f}; with fusedhead.min_logits=0 it would be fused)"
    )


def rows_from(device_type: str, memory: int) -> int:
    """Bytes of logits from which on a row program pays."""
    return WINDOWS.get(device_type, 1) * window_bytes(device_type, memory)


def weight(site: Site) -> tuple[Node, ...]:
    return tuple(leaves([site.head.weight]))

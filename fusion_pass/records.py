"""What the report says of a head: its sizes, what it computes, what computes it, at which price.

This file decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from fusedhead.interpret import Site
from fusedhead.kernels.columns import parse
from fusedhead.kernels.contract import Needs
from fusedhead.kernels.torch_products import product_dtype
from fusedhead.linear_tail import NONE_NEEDED
from fusedhead.lowering.plan import Plan, plan
from fusedhead.read import fake, hint, where
from fusedhead.report import HeadRecord
from fusedhead.row_region import Region


def planner(call: Node, memory: int) -> Callable[[bool], Plan]:
    """What the planner will choose for a head's call with this compilation's sizes, given "is the tail linear"."""
    h, w, cols, rows = (fake(call.args[i]) for i in (0, 1, 3, 4))  # type: ignore[arg-type]
    needs = Needs(*(x.requires_grad for x in (h, w, cols, rows)))
    transform, tokens = parse(str(call.args[6])), hint(h.shape[0]) or 0

    def planned(linear: bool) -> Plan:
        return plan(
            tokens, int(w.shape[0]), int(w.shape[1]), h.dtype, w.device.type,
            products=product_dtype(h.dtype, w.device.type),
            needs=needs, linear=linear, transform=transform, memory=memory,
        )  # fmt: skip

    return planned


def engine(planned: Callable[[bool], Plan], why: str) -> str:
    """What computes a head, how, and at what price, for the report."""
    chosen = planned(not why)
    name = chosen.engine.replace("_", " ")
    if why == NONE_NEEDED:
        return f"{name}: forward only"
    how = "gradients in the forward sweep" if not why else f"recompute in the backward ({why})"
    held, work = chosen.predicted_bytes / 2**20, chosen.predicted_flop / 1e9
    return f"{name}: {how}; {held:,.1f} MiB of workspace, {work:,.3g} GFLOP"


def row_engine(why: str) -> str:
    """The same for a row program; ``why`` its gradients are not computed in the forward sweep."""
    how = {"": ", with their gradients", NONE_NEEDED: ""}.get(why, f", again in the backward ({why})")
    return f"row windows: the program's own ops on some tokens at a time{how}"


def tokens_of(site: Site) -> Any:
    shape = fake(site.head.node).shape[:-1] if fake(site.head.node).ndim else ()
    if site.terminals:
        logits = site.terminals[0][1].logits
        shape = [s for d, s in enumerate(logits.val.shape) if d != logits.class_dim]
    return math.prod(shape)


def describe(site: Site, reason: str, engine: str, deferred: bool = False, region: Region | None = None) -> HeadRecord:
    """The record of a site: ``reason`` is "" where it was fused, and ``engine`` what computes it then.

    ``deferred``: returned logits are handed out deferred. ``region``: the row program that reads its logits.
    """
    vocab, hidden = site.head.weight.val.shape
    tokens = tokens_of(site)
    fused = not reason
    size = (hint(tokens) or 0) * vocab * site.head.dtype.itemsize
    computed = [t.computes for _, t in site.terminals] + ([region.computes] if region else [])
    return HeadRecord(
        fused=fused,
        reason=reason,
        where=where(site.head.node),
        computes=", ".join(dict.fromkeys(computed)) or ("returned, deferred" if fused else ""),
        tokens=tokens if isinstance(tokens, int) else str(tokens),
        hidden_size=hidden,
        vocab_size=vocab,
        logits=("never built" if fused and not site.outputs else "deferred" if fused and deferred else "built"),
        engine=engine,
        bytes_saved=size if fused and (deferred or not site.outputs) else 0,
        bytes_logits=size,
        dtype=str(site.head.dtype).removeprefix("torch."),
        device=site.head.weight.val.device.type,
        source=site.head.node.meta.get("stack_trace") or "",
    )

"""Profitability: heads that are too small to pay stay, and the report says so.

Fusing a small head costs time: its windows are launched one by one, where Inductor has one kernel. The memory that it
saves, [N, V], is then small too. The break-even point:

| device | step time of a float32 head, fused over Inductor's, by logits                                       | from |
|--------|-----------------------------------------------------------------------------------------------------|------|
| CPU    | 2^11: 5.1, 2^13: 3.2-3.7, 2^15: 1.5-2.8, 2^17: 1.3-2.4, 2^19: 1.0-1.9, 2^20: 1.1-1.3, 2^22: 0.8-1.0 | 2^20 |
| CUDA   | below 2^22 the logits and their gradient, 16 MiB, lie in the second-level cache: no traffic to save  | 2^22 |

(one thread, D from 64 to 768, V from 128 to 50257, forward and backward.)

A symbolic size differs from call to call. A head that may be large is fused, and its op is told the break-even number
of logits: a smaller call builds them whole, in as few calls of torch as the plain program (`whole`). This adds no
guard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fusedhead.analysis.body import NONE_EXCLUDED, Body
from fusedhead.analysis.cost import mebibytes, sizes_of
from fusedhead.analysis.site import Site, tokens_of
from fusedhead.graph.nodes import fake, hint, most
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.ir.expr import nodes_of
from fusedhead.ir.logits import StackedProjection
from fusedhead.ir.shards import sharded
from fusedhead.kernels.contract import Needs
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.kernels.torch_engine.whole import ALL
from fusedhead.legality.reasons import Unprofitable
from fusedhead.lowering.engines import engine_for
from fusedhead.lowering.plan.plan import plan
from fusedhead.lowering.plan.problem import Problem
from fusedhead.lowering.plan.tokenwise import window_bytes
from fusedhead.lowering.token_ops import logits_bytes

LEAST_LOGITS = {"cuda": 1 << 22}  # logits, by device
LEAST_ELSEWHERE = 1 << 20
MAY_HOLD = {"cuda": 1.5}  # times the bytes of the logits; 1 elsewhere
MOST_TOKENS = 1 << 24
WINDOWS = {"cuda": 2}  # windows of a token program that its logits must fill


def least_logits(device_type: str, min_logits: str | int) -> int:
    """The smallest number of logits of a fused head; ``min_logits`` is the option of that name."""
    return LEAST_LOGITS.get(device_type, LEAST_ELSEWHERE) if isinstance(min_logits, str) else min_logits


def run(body: Body) -> None:
    """Refuse heads that are too small. Heads of one token program are refused only if all of them are."""
    if not body.decisions:
        return
    too_small = gate(body.reading.sites, body.options.min_logits, body.excluded)
    least = limits(body.reading.sites, body.options.min_logits, body.options.budget)
    sites = {site.head: site for site in body.reading.sites}
    for i, decision in enumerate(body.decisions):
        site = decision.site
        body.least[site.head] = least(site)
        region = body.regions.get(site.head)
        coupled = [site] if region is None else [sites[head] for head in region.heads if head in sites]
        if not decision.reason and all(map(too_small, coupled)):
            body.decisions[i] = decision._replace(reason=too_small(site))


def find_grown_heads(body: Body) -> None:
    """Find the fused heads whose workspace exceeds their logits. The driver then runs the passes without them."""
    for decision in body.fused():
        site = decision.site
        reason = grown(site, body)
        if reason:
            body.grown[site.head.node.name] = reason


def grown(site: Site, body: Body) -> Refusal | None:
    """Why a fused head must be left after all: its windows would hold more bytes than its logits.

    On CUDA some growth pays: at (2048, 4096, 32000) a step holds 157 MiB instead of 125 MiB of logits and takes 0.96 of
    Inductor's time. A limit set by the user counts logits only, and with a symbolic number of tokens each call decides.
    """
    built = bool(site.outputs) and not body.defers
    if sharded(site.head):  # uneven shards differ in size, and all ranks must decide the same
        return None
    if body.options.min_logits != "auto" or built or body.least[site.head]:
        return None
    vocab, tokens = int(site.head.weight.val.shape[0]), hint(tokens_of(site)) or 0
    logits, held = sizes_of(body.prices_of(site), tokens, vocab * site.head.dtype.itemsize)(tokens)
    if held <= MAY_HOLD.get(site.head.weight.val.device.type, 1.0) * logits:
        return None
    return refuse(Unprofitable.GROWS, held=mebibytes(held), logits=mebibytes(logits))


def gate(
    sites: Iterable[Site], min_logits: str | int, excluded: Mapping[str, Refusal] = NONE_EXCLUDED
) -> Callable[[Site], Refusal | None]:
    """A function that says why a site is too small, or None.

    Heads of one graph that share a weight count together: a loop over pieces of the tokens is one head. Stacked heads
    count separately, since each is swept alone. A symbol counts with its largest value. ``excluded``: the refusals of
    `grown`, by the products' names.
    """
    count: Counter[tuple[Node, ...]] = Counter()
    for site in sites:
        parts = len(site.head.parts) if isinstance(site.head, StackedProjection) else 1
        count[weight(site)] += most(fake(site.head.node).numel()) / parts  # type: ignore[assignment]

    def too_small(site: Site) -> Refusal | None:
        least = least_logits(fake(site.head.node).device.type, min_logits)
        logits = count[weight(site)]
        if logits >= least:
            return excluded.get(site.head.node.name)
        return refuse(Unprofitable.FEW_LOGITS, logits=logits, least=least)

    return too_small


def too_small_for_a_token_program(projections: Iterable[Node], memory: int) -> Refusal | None:
    """Why the logits of some heads are too few for a token program, or None.

    A token program saves memory and costs time: unless its gradients are known up to a factor, it computes the product
    again where Inductor reads stored logits. Below the size of one window, on CUDA of two, there is little to save.
    """
    logits = [fake(node) for node in projections]
    held = sum(most(z.numel()) * z.dtype.itemsize for z in logits)
    least = rows_from(logits[0].device.type, memory)
    if held >= least:
        return None
    return refuse(Unprofitable.FEW_FOR_A_TOKEN_PROGRAM, held=held / 2**20, least=least / 2**20)


def pays_from(h: Tensor, w: Tensor, min_logits: str | int, memory: int) -> int:
    """The smallest number of logits for which a call on ``h`` [N, D] and ``w`` [V, D] is fused, N a symbol.

    Combines both parts of the gate for each N: the number of logits, and windows that hold no more than the logits.
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
    """A function that gives the smallest number of logits of a fused call; 0 where the gate knows the number.

    Sites on one weight share the limit, as in `gate`.
    """
    sharing = Counter(weight(site) for site in sites)

    def least(site: Site) -> int:
        if isinstance(fake(site.head.node).numel(), int):
            return 0
        return pays_from(site.head.hidden.val, site.head.weight.val, min_logits, memory) // sharing[weight(site)]

    return least


def limit_calls(body: Body) -> None:
    """Set ``whole_below`` of each op whose number of tokens is a symbol: smaller calls build their logits whole.

    Calls on one weight share the limit. Where the gradient takes a second op, smaller calls keep their product for it.
    """
    if not body.emitted:
        return
    calls: dict[Any, list[Node]] = {}
    for op in (torch.ops.fusedhead.head_stats.default, torch.ops.fusedhead.head_loss.default):
        for call in body.graph.find_nodes(op="call_function", target=op):
            calls.setdefault(call.args[1], []).append(call)
    for sharing in calls.values():
        for call in sharing:
            h, w = fake(call.args[0]), fake(call.args[1])  # type: ignore[arg-type]
            if isinstance(h.shape[0] * w.shape[0], int):
                continue
            least = pays_from(h, w, body.options.min_logits, body.options.budget) // len(sharing)
            if not least:
                continue
            call.args = (*call.args, least)
            if call.target is torch.ops.fusedhead.head_stats.default and keeps_product(call):
                call.args = (*call.args, True)
            body.edited(call)
    limit_token_programs(body)


def keeps_product(call: Node) -> bool:
    """Whether a ``head_stats`` call is differentiated and keeps its product for the backward."""
    h, w = fake(call.args[0]), fake(call.args[1])  # type: ignore[arg-type]
    engine = engine_for(h.dtype, h.device.type).for_few_logits
    return (
        is_counted(h.shape[0])
        and isinstance(w.shape[0], int)
        and engine is not None
        and engine.keeps_product
        and set(str(call.args[7]).split(",")) <= {*ALL, "lse_low"}
        and any(map(records_gradient, call.users))
    )


def records_gradient(node: Node) -> bool:
    """Whether a tensor's node has a gradient."""
    return isinstance(fake(node), Tensor) and fake(node).requires_grad


def is_counted(tokens: Any) -> bool:
    """Whether a number of tokens is a symbol that the caller's tensors determine."""
    return isinstance(tokens, torch.SymInt) and not free_unbacked_symbols(tokens)


def limit_token_programs(body: Body) -> None:
    """Set ``keep_below`` of each differentiated ``head_rows`` call: smaller calls keep their products for the backward.

    Calls on one weight share the limit.
    """
    min_logits, memory = body.options.min_logits, body.options.budget
    calls: Any = body.graph.find_nodes(op="call_function", target=torch.ops.fusedhead.head_rows.default)
    sharing = Counter(call.args[0][1] for call in calls)
    for call in calls:
        tensors = [fake(t) for t in call.args[0]]
        token_bytes = logits_bytes(tensors, call.args[1])
        if not is_counted(tensors[0].shape[0]) or not isinstance(token_bytes, int):
            continue
        if not any(map(records_gradient, call.users)):
            continue
        device = tensors[0].device.type
        least = rows_from(device, memory) if isinstance(min_logits, str) else min_logits * tensors[1].element_size()
        if least := least // sharing[call.args[0][1]]:
            call.args = (*call.args, least)
            body.edited(call)


def rows_from(device_type: str, memory: int) -> int:
    """The smallest number of bytes of logits for which a token program pays."""
    return WINDOWS.get(device_type, 1) * window_bytes(device_type, memory)


def weight(site: Site) -> tuple[Node, ...]:
    return tuple(nodes_of([site.head.weight]))

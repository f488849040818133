"""Which engine computes a head, by which algorithm, in which windows: a pure function of sizes and a budget.

| algorithm    | products | workspace                              | when                                    |
|--------------|----------|----------------------------------------|-----------------------------------------|
| statistics   | 1        | one block                              | nothing to differentiate now            |
| single pass  | 3        | one window of exponentials, tokens x V | the loss is linear in the statistics    |
| frozen       | 2        | one block (Triton: one window)         | the same, and w wants no gradient       |
| recompute    | 4 (or 3) | one block                              | any upstream; too small a budget        |
| whole        | 3 (or 1) | all logits                             | fewer logits than `whole_below`         |

A product is 2 N V D FLOP; recompute is 3 products where the lse is known from the forward. On the CPU a
block is cut to the caches by the engine; the windows of the Triton engine are in `plan.triton`. It must not know
about graphs, tensors or ops.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from fusedhead.kernels.chips import triton_serves
from fusedhead.kernels.contract import Needs, Windows
from fusedhead.kernels.torch_engine.blocks import block_columns
from fusedhead.kernels.torch_engine.product_dtypes import kept_dtype
from fusedhead.kernels.torch_engine.workspace import whole_bytes, workspace
from fusedhead.kernels.transform.transform import Transform
from fusedhead.lowering.plan import triton as triton_plan
from fusedhead.lowering.plan.triton import Sizes, Way

AUTO, LEAST = 0, -1  # values of the option `memory` that are no budget in MiB
MIB = 1 << 20
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NO_TRANSFORM = Transform()
BOTH = Needs(True, True, False, False)


class Limits(NamedTuple):
    """What suits the torch engine; tokens counts rows of z in a window."""

    tokens: int  # more than this gains no speed
    fewest_tokens: int  # fewer make a single pass slower than to recompute
    share: int  # auto takes at least this many windows, to hold less than a quarter of the logits
    block_tokens: int  # where no row of z has to be complete: 512 cost float32 3-5 %
    least_tokens: int  # of a block under "min"
    least_vocab: int
    exact_sums: int  # up to this many windows, sums of dw in a narrow dtype err less than eager code does


# exact_sums: the error of dw against float64 was below eager's up to 8 windows and 1.1 times it at 32
LIMITS = Limits(512, 64, 5, 1024, 128, 512, 8)


class Plan(NamedTuple):
    engine: str  # module of fusedhead.kernels
    algorithm: str
    windows: Windows
    predicted_bytes: int  # workspace at the peak, without operands and results
    predicted_flop: int
    reason: str  # one sentence


def engine_for(dtype: torch.dtype, device_type: str) -> str:
    """Triton where it serves the chip and has the dtype, torch ops everywhere else."""
    by_triton = device_type == "cuda" and dtype in TRITON_DTYPES and triton_serves()
    return "triton_windows" if by_triton else "torch_windows"


class _Head(NamedTuple):
    """The arguments of `plan` that a candidate is judged by."""

    n: int
    v: int
    d: int
    k: int
    dtype: torch.dtype
    device_type: str
    products: torch.dtype  # of the torch engine's matrix products
    transform: Transform
    needs: Needs
    explicit: bool


def _way(head: _Head, algorithm: str, tokens: int, vocab: int, limits: Limits) -> Way:
    tokens = max(1, min(tokens, head.n))
    several = -(-head.n // tokens)
    narrow = head.dtype in (torch.bfloat16, torch.float16)
    wide_sums = narrow and (several > limits.exact_sums or head.device_type != "cpu")
    accumulate = torch.float32 if wide_sums else head.dtype
    keep = algorithm == "single pass" and (head.needs.w or head.needs.cols)
    windows = Windows(tokens, max(1, min(vocab, head.v)), accumulate)
    held = workspace(
        *head[:9],
        tokens=tokens,
        vocab=windows.vocab,
        accumulate=accumulate,
        keep=keep,
        explicit=head.explicit,
    )
    return Way(algorithm, windows, held)


def _halvings(largest: int, smallest: int) -> list[int]:
    """largest, largest / 2, ... down to smallest, multiples of 8 where they can be."""
    out = [max(1, largest)]
    while out[-1] // 2 >= smallest:
        out.append(max(smallest, out[-1] // 2 // 8 * 8 or 1))
    return out


def _ways(head: _Head, *, one_pass: bool, memory: int, budget: int | None) -> list[Way]:
    """What the torch engine may be asked to do, the preferred first."""
    limits = LIMITS
    n, v, needs = head.n, head.v, head.needs
    weight = needs.w or needs.cols
    narrow = head.dtype in (torch.bfloat16, torch.float16)
    in_place = -(-n // limits.exact_sums) if narrow and needs.w else 1  # tokens that spare a float32 dw
    tallest = limits.block_tokens // (2 if narrow else 1)  # narrow logits gain nothing, their float32 block is more
    heights = _halvings(tallest, 16) if memory != LEAST else [limits.least_tokens]
    heights = [max(tokens, in_place) for tokens in heights] + [at for at in heights if at < in_place]
    size = torch.float64.itemsize if head.dtype == torch.float64 else torch.float32.itemsize
    blocks = [
        (tokens, vocab)
        for tokens in heights
        for vocab in _halvings(block_columns(min(tokens, max(1, n)), v, size), limits.least_vocab)
    ]
    if memory == LEAST:
        blocks = [(at, limits.least_vocab) for at in heights]
    # auto keeps no window that is wider than the logits
    narrow_enough = kept_dtype(head.dtype, head.products, head.transform).itemsize <= head.dtype.itemsize
    tried = [("recompute", *block) for block in blocks]
    if not any(needs):
        tried = [("statistics", *block) for block in blocks]
    elif one_pass and not weight:
        tried = [("frozen", *block) for block in blocks]
    elif one_pass and memory != LEAST and (budget or narrow_enough):
        largest = n if budget else max(-(-n // limits.share) + 7 & ~7, limits.fewest_tokens * 3)
        tokens = _halvings(min(largest, limits.tokens, n), limits.fewest_tokens)
        tried = [*(("single pass", at, v) for at in (tokens if budget else tokens[:1])), *tried]
    return [_way(head, name, tokens, vocab, limits) for name, tokens, vocab in tried]


@lru_cache(maxsize=1024)  # a step asks for every head it computes
def plan(
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    device_type: str,
    *,
    products: torch.dtype,
    needs: Needs = BOTH,
    linear: bool = True,
    one_sweep: bool = True,
    explicit: bool = False,
    transform: Transform = NO_TRANSFORM,
    labels: int = 1,
    memory: int = AUTO,
    free_bytes: int | None = None,
    whole_below: int = 0,
) -> Plan:
    """How to compute one head.

    N tokens, V vocabulary, D hidden size, of operands of ``dtype`` on ``device_type``, where the torch engine
    multiplies in ``products`` (`product_dtypes.product_dtype`). ``needs`` says which
    operands want a gradient from this call (none for the statistics alone), ``linear`` that coefficients are
    known before the sweep, ``one_sweep`` that gradients are a row scale away from exponentials, ``explicit``
    that a sweep writes out dz or all statistics. ``memory`` is 0 for auto, -1 for the least, else MiB;
    ``free_bytes`` bounds auto from above where the device is nearly full. Fewer logits than ``whole_below`` are built
    whole, whatever the budget: Inductor would have built them (`fusedhead.size_gate`). The kernels of the Triton engine
    are few for small heads as they are.
    """
    engine = engine_for(dtype, device_type)
    weight = needs.w or needs.cols
    budget = memory * MIB if memory > 0 else None
    if memory == AUTO and free_bytes is not None:
        budget = free_bytes // 2
    if engine == "triton_windows":
        sizes, one_pass = Sizes(N, V, D, dtype, needs), linear and one_sweep
        ways = triton_plan.ways(sizes, one_pass=one_pass, budget=budget or 0)
        if memory == LEAST:
            budget = min(triton_plan.LEAST_BYTES, ways[0].held)
            ways = triton_plan.ways(sizes, one_pass=one_pass, budget=budget)
    else:
        head = _Head(N, V, D, labels, dtype, device_type, products, transform, needs, explicit)
        if whole_below > N * V:
            return _whole(head, linear=linear)
        one_pass = linear and one_sweep
        ways = _ways(head, one_pass=one_pass, memory=memory, budget=budget)
        logits = N * V * dtype.itemsize
        if memory == AUTO and budget is None and ways[0].held > logits:  # lower windows of the same kind, if they help
            lower = _ways(head, one_pass=one_pass, memory=memory, budget=logits)
            ways = [way for way in lower if way.held <= logits and way.algorithm == ways[0].algorithm] or ways
    fitting = [way for way in ways if budget is None or way.held <= budget]
    pick_least = not fitting or (memory == LEAST and engine == "torch_windows")
    name, windows, held = min(ways, key=lambda way: way.held) if pick_least else fitting[0]
    forward_too = linear and any(needs)
    count = {"statistics": 1, "frozen": 2, "single pass": 1 + needs.h + weight}.get(
        name, forward_too + 1 + needs.h + weight
    )
    return Plan(
        engine, name, windows, held, count * 2 * N * V * D, _reason(name, held, budget, memory, bool(fitting))
    )


def _whole(head: _Head, *, linear: bool) -> Plan:
    """All logits at once, and their gradient in their place."""
    n, v, d, _, dtype, _, work, transform, needs, _ = head
    held = whole_bytes(n, v, d, dtype, work, transform, needs)
    products = (linear or not any(needs)) + needs.h + (needs.w or needs.cols) + (not linear and any(needs))
    windows = Windows(max(1, n), max(1, v), dtype)
    return Plan("torch_whole", "whole", windows, held, products * 2 * n * v * d, "its logits are few, and built whole")


WHY = {
    "statistics": "one sweep, no gradient is asked for here",
    "frozen": "w wants no gradient, so no logits are kept",
    "single pass": "gradients come out of the forward sweep",
    "recompute": "logits are rebuilt for the gradients",
}


def _reason(name: str, held: int, budget: int | None, memory: int, fits: bool) -> str:
    if not fits and budget is not None:
        return f"no plan fits in {budget / MIB:.0f} MiB; this one holds the least, {held / MIB:.1f} MiB"
    limit = "the least memory" if memory == LEAST else "no limit" if budget is None else f"{budget / MIB:.0f} MiB"
    return f"{WHY[name]}; {held / MIB:.1f} MiB of workspace, asked for {limit}"

"""Which engine computes a head, by which algorithm, in which windows: a pure function of sizes and a budget.

| algorithm    | products | workspace                              | when                                    |
|--------------|----------|----------------------------------------|-----------------------------------------|
| statistics   | 1        | one block                              | nothing to differentiate now            |
| single pass  | 3        | one window of exponentials, tokens x V | the loss is linear in the statistics    |
| frozen       | 2        | one block                              | the same, and w wants no gradient       |
| recompute    | 4 (or 3) | one block                              | any upstream; too small a budget        |

A product is 2 N V D FLOP; recompute is 3 products where the lse is known from the forward. On the CPU a
block is cut to the caches by the engine, on CUDA a block is a window. It must not know about graphs,
tensors or ops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedhead.kernels.columns import Transform
from fusedhead.kernels.contract import Needs, Windows
from fusedhead.kernels.torch_blocks import block_columns
from fusedhead.kernels.torch_workspace import workspace

AUTO, LEAST = 0, -1  # values of the option `memory` that are no budget in MiB
MIB = 1 << 20
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NO_TRANSFORM = Transform()
BOTH = Needs(True, True, False, False)


class Limits(NamedTuple):
    """What suits one kind of device; tokens counts rows of z in a window."""

    tokens: int  # more than this gains no speed
    fewest_tokens: int  # fewer make a single pass slower than to recompute
    share: int  # auto takes at least this many windows, to hold a fraction of the logits
    block_tokens: int  # where no row of z has to be complete
    block_bytes: int  # what a block of that many tokens may hold: fewer blocks are fewer launches
    least_bytes: int  # the same under "min"
    least_tokens: int
    least_vocab: int
    exact_sums: int  # up to this many windows, sums of dw in a narrow dtype err less than eager code does


LIMITS = {
    # exact_sums: the error of dw against float64 was below eager's up to 8 windows on the CPU and 1.1 times it
    # at 32; on an H100 it was equal at 4 and 1.35 times at 8.
    "cpu": Limits(512, 64, 4, 512, 1 << 60, 1 << 60, 128, 512, 8),
    # least_bytes: with dh in float32 beside it, "min" stays under 256 MiB at 8192 tokens of D = 4096
    "cuda": Limits(4096, 512, 2, 8192, 256 * MIB, 96 * MIB, 8192, 2048, 4),
}


class Plan(NamedTuple):
    engine: str  # module of fusedhead.kernels
    algorithm: str
    windows: Windows
    predicted_bytes: int  # workspace at the peak, without operands and results
    predicted_flop: int
    reason: str  # one sentence


def engine_for(dtype: torch.dtype, device_type: str) -> str:
    """Triton where it exists and has the dtype, torch ops everywhere else."""
    return "triton_windows" if device_type == "cuda" and dtype in TRITON_DTYPES else "torch_windows"


class _Head(NamedTuple):
    """The arguments of `plan` that a candidate is judged by."""

    n: int
    v: int
    d: int
    k: int
    dtype: torch.dtype
    device_type: str
    transform: Transform
    needs: Needs
    explicit: bool
    engine: str


def _triton_bytes(head: _Head, tokens: int, vocab: int, accumulate: torch.dtype, keep: bool) -> int:
    """Bytes the Triton engine holds: its window, float32 sums, and row vectors."""
    size, tokens = head.dtype.itemsize, min(tokens, head.n)
    gradients = any(head.needs)
    window = tokens * (head.v if keep else min(vocab, head.v)) * size * gradients
    several = head.n > tokens
    sums = 4 * head.v * head.d * (head.needs.w and several and accumulate != head.dtype)
    narrow = head.dtype != torch.float32
    rows = 4 * tokens * head.d * (head.needs.h and narrow and (keep or head.v > vocab))
    return window + sums + rows + 64 * head.n * (1 + head.v // 4096)


def _candidate(head: _Head, algorithm: str, tokens: int, vocab: int, limits: Limits) -> tuple[Windows, int]:
    tokens = max(1, min(tokens, head.n))
    several = -(-head.n // tokens)
    narrow = head.dtype in (torch.bfloat16, torch.float16)
    on_host = head.engine == "torch_windows" and head.device_type == "cpu"
    wide_sums = narrow and (several > limits.exact_sums or not (on_host or head.engine == "triton_windows"))
    accumulate = torch.float32 if wide_sums else head.dtype
    keep = algorithm == "single pass" and (head.needs.w or head.needs.cols)
    windows = Windows(tokens, max(1, min(vocab, head.v)), accumulate)
    if head.engine == "triton_windows":
        keep = algorithm in ("single pass", "frozen")
        return windows, _triton_bytes(head, tokens, windows.vocab, accumulate, keep)
    held = workspace(
        *head[:8],
        tokens=tokens,
        vocab=windows.vocab,
        accumulate=accumulate,
        keep=keep,
        explicit=head.explicit,
    )
    return windows, held


def _block_vocab(head: _Head, tokens: int, limits: Limits) -> int:
    """Columns of a block that suits ``tokens`` rows."""
    if head.engine == "triton_windows":
        return _columns(head, tokens, limits.block_bytes)
    size = torch.float64.itemsize if head.dtype == torch.float64 else torch.float32.itemsize
    return block_columns(min(tokens, max(1, head.n)), head.v, size)


def _columns(head: _Head, tokens: int, bytes_held: int) -> int:
    """Columns of a block of ``tokens`` rows that holds ``bytes_held``, whole tiles of them."""
    columns = bytes_held // (max(1, min(tokens, head.n)) * head.dtype.itemsize)
    return max(1, min(head.v, max(128, columns // 128 * 128)))


def _halvings(largest: int, smallest: int) -> list[int]:
    """largest, largest / 2, ... down to smallest, multiples of 8 where they can be."""
    out = [max(1, largest)]
    while out[-1] // 2 >= smallest:
        out.append(max(smallest, out[-1] // 2 // 8 * 8 or 1))
    return out


def plan(
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    device_type: str,
    *,
    needs: Needs = BOTH,
    linear: bool = True,
    one_sweep: bool = True,
    explicit: bool = False,
    transform: Transform = NO_TRANSFORM,
    labels: int = 1,
    memory: int = AUTO,
    free_bytes: int | None = None,
) -> Plan:
    """How to compute one head.

    N tokens, V vocabulary, D hidden size, of operands of ``dtype`` on ``device_type``. ``needs`` says which
    operands want a gradient from this call (none for the statistics alone), ``linear`` that coefficients are
    known before the sweep, ``one_sweep`` that gradients are a row scale away from exponentials, ``explicit``
    that a sweep writes out dz or all statistics. ``memory`` is 0 for auto, -1 for the least, else MiB;
    ``free_bytes`` bounds auto from above where the device is nearly full.
    """
    engine = engine_for(dtype, device_type)
    head = _Head(N, V, D, labels, dtype, device_type, transform, needs, explicit, engine)
    limits = LIMITS["cuda" if engine == "triton_windows" else "cpu"]
    product = 2 * N * V * D
    weight = needs.w or needs.cols
    budget = memory * MIB if memory > 0 else None
    if memory == AUTO and free_bytes is not None:
        budget = free_bytes // 2

    narrow = dtype in (torch.bfloat16, torch.float16)
    in_place = -(-N // limits.exact_sums) if narrow and needs.w else 1  # tokens that spare a float32 dw
    heights = _halvings(limits.block_tokens, 16) if memory != LEAST else [limits.least_tokens]
    heights = [max(tokens, in_place) for tokens in heights] + [at for at in heights if at < in_place]
    blocks = [
        (tokens, vocab)
        for tokens in heights
        for vocab in _halvings(_block_vocab(head, tokens, limits), limits.least_vocab)
    ]
    if memory == LEAST:
        on_triton = engine == "triton_windows"
        blocks = [(at, _columns(head, at, limits.least_bytes) if on_triton else limits.least_vocab) for at in heights]
    if not any(needs):
        tried = [("statistics", *block) for block in blocks]
    elif linear and one_sweep and not weight:
        few = limits.fewest_tokens if memory == LEAST else 16
        frozen = ((tokens, V) for tokens in _halvings(limits.tokens, few))  # Triton holds whole rows here
        tried = [("frozen", *block) for block in (blocks if engine == "torch_windows" else frozen)]
    elif linear and one_sweep and memory != LEAST:
        largest = N if budget else max(-(-N // limits.share), limits.fewest_tokens * 4)
        tokens = _halvings(min(largest, limits.tokens, N), limits.fewest_tokens)
        tried = [("single pass", at, V) for at in (tokens if budget else tokens[:1])]
        tried += [("recompute", *block) for block in blocks]
    else:
        tried = [("recompute", *block) for block in blocks]

    judged = [(name, *_candidate(head, name, tokens, vocab, limits)) for name, tokens, vocab in tried]
    fitting = [at for at in judged if budget is None or at[2] <= budget]
    name, windows, held = fitting[0] if fitting and memory != LEAST else min(judged, key=lambda at: at[2])
    forward_too = linear and any(needs)
    products = {"statistics": 1, "frozen": 2, "single pass": 1 + needs.h + weight}.get(
        name, forward_too + 1 + needs.h + weight
    )
    return Plan(engine, name, windows, held, products * product, _reason(name, held, budget, memory, bool(fitting)))


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

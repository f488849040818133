"""When a head's gradient products may be float8, and in which windows (`kernels.triton_engine.float8.single_pass`).

| held                       | bytes                                                                  |
|----------------------------|------------------------------------------------------------------------|
| the tail, by columns       | V a token of the windows that one product of dw sums                   |
| the tail, by rows          | V a token of the windows that one product of dh sums                   |
| w in float8                | V D; none where one product of dw sums all tokens: it lies in dw then  |
| E w of a window in float32 | 4 D a token                                                            |
| the list of large entries  | 1560 a token of the first kind                                         |

Windows are those of the least `_milliseconds` among those that there is room for: each further product of dw is added
to it at 6 V D bytes of traffic, and a low product E w leaves multiprocessors idle. Auto holds up to half more than
where products are exact. What the kernels cannot serve keeps exact products, with a sentence for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fusedhead.kernels.contract import Windows
from fusedhead.lowering.plan.problem import LEAST_MEMORY, MIB, Candidate, Problem

BLOCK_TOKENS, PART_TOKENS = 128, 64  # tokens and classes that windows are padded to
FLOAT8_MULTIPLE = 16  # of D: what a float8 product takes
LEAST_FLOAT8_TOKENS = 1024  # fewer do not repay the list and w in float8
LEAST_HIDDEN = 1024  # with less the sweep's epilogue, which stores twice, outlasts the products that it hides behind
LEAST_FLOAT8_VOCAB = 8192  # fewer classes do neither, and roundings of a flat softmax average out over many
HEIGHTS = (5632, 4096, 3072, 2816, 2048, 1536, 1024)  # of the windows of dh
MULTIPROCESSORS, PLANNED_TILE = 132, 128  # of an H100 or H200; of a float8 product
FLOAT8_FLOPS, MEMORY_BANDWIDTH, WINDOW = (
    1.2e12,
    3.5e9,
    0.1,
)  # of such a product a ms, bytes a ms, ms that a window costs
LISTED_BYTES = 1560  # of a token: 65 entries of 12 bytes, and as much where they are sorted
FEWEST_ROWS = 2048  # tokens that one product of dw sums, where it does not sum all
FLOAT8_PRODUCT_BYTES = 64 * MIB  # of what is added to dw at once
# e4m3 errs by 2⁻⁴ of a normal number and 2⁻¹⁰ below these; 1 is stored as 2¹⁴ at least, the largest factor as 448
ERROR = (
    "each term of the tail's sums errs by at most 13 %, where a probability is below 2⁻²⁰ or a factor below 2⁻¹⁴ of "
    "the largest by 2⁻²⁴ or 2⁻¹⁸ instead; probabilities above 2⁻⁵ and the labels are exact"
)
MOST_SUMS = 3  # products that are added up in dw's own dtype, as `plan.triton.EXACT_SUMS`
EXACT: tuple[tuple[str, Callable[[Problem], bool]], ...] = (
    ("its gradients are not computed in the forward sweep", lambda p: not p.one_pass),
    ("w or h wants no gradient", lambda p: not (p.needs.h and p.needs.w)),
    ("vectors of its transform want gradients", lambda p: p.needs.cols or p.needs.rows),
    ("it is not bfloat16", lambda p: p.dtype != torch.bfloat16),
    ("its logits are not h wᵀ alone", lambda p: bool(p.transform.smooth.steps)),
    ("the sum over the logits takes part in its loss", lambda p: p.sums),
    ("a token has several labels", lambda p: p.labels > 1),
    (f"its hidden size is below {LEAST_HIDDEN}, where float8 does not pay", lambda p: p.hidden < LEAST_HIDDEN),
    (f"its hidden size is no multiple of {FLOAT8_MULTIPLE}", lambda p: p.hidden % FLOAT8_MULTIPLE != 0),
    (
        f"it has fewer than {LEAST_FLOAT8_TOKENS} tokens, for which float8 does not pay",
        lambda p: p.tokens < LEAST_FLOAT8_TOKENS,
    ),
    (
        f"it has fewer than {LEAST_FLOAT8_VOCAB} classes, for which float8 does not pay",
        lambda p: p.vocab < LEAST_FLOAT8_VOCAB,
    ),
)


def why_exact(problem: Problem, memory: int) -> str:
    """Why float8 does not serve this head, "" where it does. The kernels' own needs are asked for elsewhere."""
    if memory == LEAST_MEMORY:
        return "the least memory is asked for"
    return next((why for why, holds in EXACT if holds(problem)), "")


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _candidate(problem: Problem, tokens: int, rows: int) -> Candidate:
    n, v, d = problem.tokens, _padded(problem.vocab, PART_TOKENS), problem.hidden
    tokens, rows = min(tokens, _padded(n, BLOCK_TOKENS)), min(rows, tokens)
    alone = tokens >= n
    held = MIB + n * 192 + tokens * (v + LISTED_BYTES) + rows * (v + 4 * d) + (0 if alone else v * d)
    after = MIB + n * 192 + tokens * (v + LISTED_BYTES + d) + (0 if alone else v * d + FLOAT8_PRODUCT_BYTES)
    windows = Windows(tokens, problem.vocab, problem.dtype, rows)
    return Candidate("float8", windows, max(held, after))


def _ways(problem: Problem) -> Iterator[Candidate]:
    for count in range(1, MOST_SUMS + 1):
        tokens = _padded(-(-problem.tokens // count), BLOCK_TOKENS)
        if count > 1 and tokens < FEWEST_ROWS:
            return
        for rows in HEIGHTS:
            if rows <= tokens or rows == HEIGHTS[-1]:
                yield _candidate(problem, tokens, rows)


def _milliseconds(problem: Problem, way: Candidate) -> float:
    """What differs between the ways, on an H200."""
    n, v, d, rows = problem.tokens, problem.vocab, problem.hidden, way.windows.tail_rows
    tiles = -(-rows // PLANNED_TILE) * -(-d // PLANNED_TILE)
    idle = -(-tiles // MULTIPROCESSORS) * MULTIPROCESSORS / tiles
    adds = -(-n // way.windows.tokens) - 1
    return 2 * n * v * d / FLOAT8_FLOPS * idle + adds * 6 * v * d / MEMORY_BANDWIDTH + -(-n // rows) * WINDOW


def float8_candidates(problem: Problem, most: int) -> list[Candidate]:
    """Ways that hold no more than ``most`` bytes (0: any), the fastest first."""
    ways = [way for way in _ways(problem) if not most or way.workspace_bytes <= most]
    return sorted(ways, key=lambda way: _milliseconds(problem, way))

"""When a head's gradient products may be float8, and in which windows (`kernels.triton_engine.float8.single_pass`).

| held                       | bytes                                                                  |
|----------------------------|------------------------------------------------------------------------|
| the tail, by columns       | V a token of the windows that one product of dw sums                   |
| the tail, by rows          | V a token of the windows that one product of dh sums                   |
| w in float8                | V D; none where one product of dw sums all tokens: it lies in dw then  |
| E w of a window in float32 | 4 D a token                                                            |
| the list of large entries  | 1560 a token of the first kind                                         |

The first kind is taken as tall as there is room for, since each further product is added to dw at 6 V D bytes of
traffic. What the kernels cannot serve keeps today's plan, with a sentence for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fusedhead.kernels.contract import Windows
from fusedhead.lowering.plan.problem import LEAST_MEMORY, MIB, Candidate, Problem

BLOCK, PART = 128, 64  # tokens and classes that windows are padded to
MULTIPLE = 16  # of D: what a float8 product takes
LEAST_TOKENS = 1024  # fewer do not repay the list and w in float8
LEAST_VOCAB = 8192  # fewer classes do neither, and roundings of a flat softmax average out over many
HEIGHTS = (4096, 3072, 2048, 1024)  # of the windows of dh
LISTED_BYTES = 1560  # of a token: 65 entries of 12 bytes, and as much where they are sorted
FEWEST = 2048  # tokens that one product of dw sums, where it does not sum all
PRODUCT_BYTES = 64 * MIB  # of what is added to dw at once
ERROR = "each product of the tail's sums errs by at most 13 %: both factors are rounded to 3 bits"
MOST_SUMS = 3  # products that are added up in dw's own dtype, as `plan.triton.EXACT_SUMS`
EXACT: tuple[tuple[str, Callable[[Problem], bool]], ...] = (
    ("its gradients are not computed in the forward sweep", lambda p: not p.one_pass),
    ("w or h wants no gradient", lambda p: not (p.needs.h and p.needs.w)),
    ("vectors of its transform want gradients", lambda p: p.needs.cols or p.needs.rows),
    ("it is not bfloat16", lambda p: p.dtype != torch.bfloat16),
    ("its logits are not h wᵀ alone", lambda p: bool(p.transform.smooth.steps)),
    ("the sum over the logits takes part in its loss", lambda p: p.sums),
    ("a token has several labels", lambda p: p.labels > 1),
    (f"its hidden size is no multiple of {MULTIPLE}", lambda p: p.hidden % MULTIPLE != 0),
    (f"it has fewer than {LEAST_TOKENS} tokens, for which float8 does not pay", lambda p: p.tokens < LEAST_TOKENS),
    (f"it has fewer than {LEAST_VOCAB} classes, for which float8 does not pay", lambda p: p.vocab < LEAST_VOCAB),
)


def why_exact(problem: Problem, memory: int) -> str:
    """Why float8 does not serve this head, "" where it does. The kernels' own needs are asked for elsewhere."""
    if memory == LEAST_MEMORY:
        return "the least memory is asked for"
    return next((why for why, holds in EXACT if holds(problem)), "")


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _candidate(problem: Problem, tokens: int, rows: int) -> Candidate:
    n, v, d = problem.tokens, _padded(problem.vocab, PART), problem.hidden
    tokens, rows = min(tokens, _padded(n, BLOCK)), min(rows, tokens)
    alone = tokens >= n
    held = MIB + n * 192 + tokens * (v + LISTED_BYTES) + rows * (v + 4 * d) + (0 if alone else v * d)
    after = MIB + n * 192 + tokens * (v + LISTED_BYTES + d) + (0 if alone else v * d + PRODUCT_BYTES)
    windows = Windows(tokens, problem.vocab, problem.dtype, rows)
    return Candidate("float8", windows, max(held, after))


def _ways(problem: Problem) -> Iterator[Candidate]:
    count = 1
    while True:
        tokens = _padded(-(-problem.tokens // count), BLOCK)
        if count > 1 and tokens < FEWEST:
            return
        for rows in HEIGHTS:
            if rows <= tokens or rows == HEIGHTS[-1]:
                yield _candidate(problem, tokens, rows)
        count += 1


def float8_candidates(problem: Problem, most: int) -> list[Candidate]:
    """Ways that hold no more than ``most`` bytes (0: any), the fastest first."""
    ways = [way for way in _ways(problem) if -(-problem.tokens // way.windows.tokens) <= MOST_SUMS]
    return [way for way in ways if not most or way.workspace_bytes <= most]

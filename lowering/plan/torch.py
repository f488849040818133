"""The torch engine's candidates for one head, the preferred first, with the bytes that each holds."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedhead.kernels.contract import Windows
from fusedhead.kernels.torch_engine.blocks import block_columns
from fusedhead.kernels.torch_engine.product_dtypes import kept_dtype
from fusedhead.kernels.torch_engine.workspace import whole_bytes, workspace
from fusedhead.lowering.plan.problem import AUTO, LEAST_MEMORY, Candidate, Problem


class Limits(NamedTuple):
    """Limits of the torch engine's windows; tokens are rows of z in a window."""

    tokens: int  # larger windows are no faster
    fewest_tokens: int  # smaller windows make a single pass slower than recomputing
    share: int  # auto takes at least this many windows, to hold less than a quarter of the logits
    block_tokens: int  # where no row of z must be complete: 512 cost float32 3-5 %
    least_tokens: int  # of a block under "min"
    least_vocab: int
    exact_sums: int  # up to this many windows, dw summed in a narrow dtype errs less than in eager code


# exact_sums: the error of dw against float64 was below eager's up to 8 windows and 1.1 times it at 32
LIMITS = Limits(512, 64, 5, 1024, 128, 512, 8)


def _candidate(problem: Problem, algorithm: str, tokens: int, vocab: int) -> Candidate:
    n, v, d, dtype, device_type, products, needs, *_ = problem
    tokens = max(1, min(tokens, n))
    several = -(-n // tokens)
    wide_sums = problem.narrow and (several > LIMITS.exact_sums or device_type != "cpu")
    accumulate = torch.float32 if wide_sums else dtype
    windows = Windows(tokens, max(1, min(vocab, v)), accumulate)
    held = workspace(
        n, v, d, problem.labels, dtype, device_type, products, problem.transform, needs,
        tokens=tokens,
        vocab=windows.vocab,
        accumulate=accumulate,
        keep=algorithm == "single pass" and (needs.w or needs.cols),
        explicit=problem.explicit,
    )  # fmt: skip
    return Candidate(algorithm, windows, held)


def _halvings(largest: int, smallest: int) -> list[int]:
    """largest, largest / 2, ... down to smallest, as multiples of 8 where possible."""
    out = [max(1, largest)]
    while out[-1] // 2 >= smallest:
        out.append(max(smallest, out[-1] // 2 // 8 * 8 or 1))
    return out


def _blocks(problem: Problem, memory: int) -> list[tuple[int, int]]:
    """(tokens, columns) of blocks whose rows need not be complete, the largest first."""
    n, v, needs, narrow = problem.tokens, problem.vocab, problem.needs, problem.narrow
    in_place = -(-n // LIMITS.exact_sums) if narrow and needs.w else 1  # tokens for which no float32 dw is needed
    tallest = LIMITS.block_tokens // (2 if narrow else 1)  # narrow logits gain nothing: their float32 block is larger
    heights = _halvings(tallest, 16) if memory != LEAST_MEMORY else [LIMITS.least_tokens]
    heights = [max(tokens, in_place) for tokens in heights] + [at for at in heights if at < in_place]
    if memory == LEAST_MEMORY:
        return [(at, LIMITS.least_vocab) for at in heights]
    size = torch.float64.itemsize if problem.dtype == torch.float64 else torch.float32.itemsize
    return [
        (tokens, vocab)
        for tokens in heights
        for vocab in _halvings(block_columns(min(tokens, max(1, n)), v, size), LIMITS.least_vocab)
    ]


def _preferred(problem: Problem, memory: int, budget: int | None) -> list[Candidate]:
    n, v, needs = problem.tokens, problem.vocab, problem.needs
    blocks = _blocks(problem, memory)
    # auto keeps no window larger than the logits
    kept = kept_dtype(problem.dtype, problem.products, problem.transform)
    tried = [("recompute", *block) for block in blocks]
    if not any(needs):
        tried = [("statistics", *block) for block in blocks]
    elif problem.one_pass and not (needs.w or needs.cols):
        tried = [("frozen", *block) for block in blocks]
    elif problem.one_pass and memory != LEAST_MEMORY and (budget or kept.itemsize <= problem.dtype.itemsize):
        largest = n if budget else max(-(-n // LIMITS.share) + 7 & ~7, LIMITS.fewest_tokens * 3)
        tokens = _halvings(min(largest, LIMITS.tokens, n), LIMITS.fewest_tokens)
        tried = [*(("single pass", at, v) for at in (tokens if budget else tokens[:1])), *tried]
    return [_candidate(problem, *each) for each in tried]


def torch_candidates(problem: Problem, memory: int, budget: int | None) -> tuple[list[Candidate], int | None]:
    """Candidates for this head, the preferred first, and the bytes that they should fit in, None for any.

    ``memory`` is the option, ``budget`` its limit in bytes (None: the device's default).
    """
    ways = _preferred(problem, memory, budget)
    if memory == LEAST_MEMORY:
        return [min(ways, key=lambda way: way.workspace_bytes)], budget
    logits = problem.tokens * problem.vocab * problem.dtype.itemsize
    if memory == AUTO and budget is None and ways[0].workspace_bytes > logits:  # windows of fewer tokens may help
        lower = _preferred(problem, memory, logits)
        algorithm = ways[0].algorithm
        ways = [way for way in lower if way.workspace_bytes <= logits and way.algorithm == algorithm] or ways
    return ways, budget


def whole_candidates(problem: Problem, memory: int, budget: int | None) -> tuple[list[Candidate], int | None]:
    """The candidate that builds all logits at once and overwrites them by their gradient. It ignores the budget."""
    n, v, d, dtype, _, products, needs, *_ = problem
    held = whole_bytes(n, v, d, dtype, products, problem.transform, needs)
    return [Candidate("whole", Windows(max(1, n), max(1, v), dtype), held)], None

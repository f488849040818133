"""The torch engine's candidates for one head, the preferred first, with the bytes that each holds."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedhead.kernels.contract import Windows
from fusedhead.kernels.torch_engine.blocks import block_columns
from fusedhead.kernels.torch_engine.cpp_window import LANES, cpp_workspace
from fusedhead.kernels.torch_engine.product_dtypes import kept_dtype
from fusedhead.kernels.torch_engine.workspace import rows_workspace, whole_bytes, workspace
from fusedhead.lowering.plan.problem import AUTO, LEAST_MEMORY, Candidate, Problem


class Limits(NamedTuple):
    """Limits of the torch engine's windows; tokens are rows of z in a window."""

    tokens: int  # larger windows are no faster
    fewest_tokens: int  # smaller windows make a single pass slower than recomputing
    share: int  # auto takes at least this many windows, to hold less than a quarter of the logits
    block_tokens: int  # where no row of z must be complete: 512 cost float32 3-5 %
    least_tokens: int  # of a block under "min"
    least_vocab: int
    cpp_tokens: int  # of the C++ kernel's windows
    exact_sums: int  # up to this many windows, dw summed in a narrow dtype errs less than in eager code


# exact_sums: the error of dw against float64 was below eager's up to 8 windows and 1.1 times it at 32
LIMITS = Limits(512, 64, 5, 1024, 128, 512, 512, 8)


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


def _cpp_serves(problem: Problem) -> bool:
    """Whether windows of the C++ kernel compute this head: one softmax of an h wᵀ times a constant."""
    plain = problem.transform.plain_scale is not None and not (problem.needs.cols or problem.needs.rows)
    return bool(problem.threads) and plain and problem.row_scale and not problem.explicit


def _cpp_candidates(problem: Problem, budget: int | None) -> list[Candidate]:
    """Windows of the C++ kernel: whole rows, and as many tokens as there is room for, in whole vectors."""
    n, v, d, needs = problem.tokens, problem.vocab, problem.hidden, problem.needs
    keep = problem.one_pass and needs.w
    algorithm = "statistics" if not any(needs) else "recompute" if not problem.one_pass else "single pass"
    algorithm = "frozen" if algorithm == "single pass" and not keep else algorithm
    largest = max(n // LIMITS.share, LIMITS.fewest_tokens * 3) if keep and not budget else LIMITS.cpp_tokens
    largest = min(largest, LIMITS.cpp_tokens)
    room = budget or n * v * problem.dtype.itemsize // 2
    sizes = [max(LANES, tokens // LANES * LANES) for tokens in _halvings(largest, LIMITS.fewest_tokens)]
    ways = []
    for tokens in sizes:
        windows = Windows(max(1, min(tokens, n)), max(1, v), problem.dtype, threads=problem.threads)
        rows = rows_workspace(n, v, d, problem.labels, windows.tokens)
        held = rows + cpp_workspace(windows.tokens, v, d, needs, problem.threads, keep)
        ways.append(Candidate(algorithm, windows, held))
    return [way for way in ways if way.workspace_bytes <= room]


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
    compiled = _cpp_candidates(problem, budget) if _cpp_serves(problem) and memory != LEAST_MEMORY else []
    tried = [("recompute", *block) for block in blocks]
    if not any(needs):
        tried = [("statistics", *block) for block in blocks]
    elif problem.one_pass and not (needs.w or needs.cols):
        tried = [("frozen", *block) for block in blocks]
    elif problem.one_pass and memory != LEAST_MEMORY and (budget or kept.itemsize <= problem.dtype.itemsize):
        largest = n if budget else max(-(-n // LIMITS.share) + 7 & ~7, LIMITS.fewest_tokens * 3)
        tokens = _halvings(min(largest, LIMITS.tokens, n), LIMITS.fewest_tokens)
        tried = [*(("single pass", at, v) for at in (tokens if budget else tokens[:1])), *tried]
    return compiled + [_candidate(problem, *each) for each in tried]


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

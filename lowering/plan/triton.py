"""The Triton engine's candidates for one head, the fastest first, with the bytes that each holds.

| algorithm   | held besides operands and results                                                          |
|-------------|--------------------------------------------------------------------------------------------|
| statistics  | partial rows, in float32 a window of logits [tokens, V] too                                |
| single pass | a window of exponentials [tokens, V], E w of its rows in float32, float32 sums of dw        |
|             | in float16 also a sample of w, which gives each row its level: 1 % of a product             |
| frozen      | the same without dw                                                                        |
| float8      | `plan.float8`                                                                              |
| recompute   | a block of dz [tokens, vocab], half of dh of its rows in float32, float32 sums of dw        |

Where a single pass would do but does not fit, recompute keeps the exponentials of its first block. Wide, short windows
are preferred: a wider kept block means fewer recomputed columns.

Rules behind the order, measured on an H100 (benchmarks/NOTES.md): windows are equal and of whole token blocks, or all
but the last up to a fifth taller, where E w then fills whole waves of cuBLAS's tiles (1 % of a step at D = 4096, 4 % at
2560); dw is added up in its own dtype over up to `EXACT_SUMS` windows (each addition rounds: at 4 windows the error of
dw was that of eager code, at 8 1.35 times it), in float32 over more, half of which lies in dw's own memory; a window of
less than `AUTO_TOKENS` rows costs speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fusedhead.kernels.contract import Windows, even_size
from fusedhead.lowering.plan.float8 import float8_candidates, why_exact
from fusedhead.lowering.plan.problem import LEAST_MEMORY, MIB, Candidate, Problem

WAVE = 132 * 256 * 128  # numbers that cuBLAS's tiles on all multiprocessors of an H100 compute at once
TALLER = 1.2  # of a window, to fill its last wave
TOKEN_BLOCK = 128  # tokens and columns that windows are cut to
TILE = 256  # columns of a kernel's tile: a block of whole tiles leaves no program half a tile
EXACT_SUMS = 3
MOST_WINDOW_TOKENS = 8192  # of a window
SUMMED_TOKENS = (1536, 4096)  # of a window where dw is summed in float32: fewer lose to recompute, more gain nothing
AUTO_TOKENS = 2048  # auto goes no lower to save memory
FEWEST_TOKENS = 512  # fewer make a single pass slower than to recompute
FROZEN_BYTES, FROZEN_TOKENS = 576 * MIB, 1024
DZ_BYTES = 256 * MIB  # of dz: fewer blocks are fewer launches
RECOMPUTE_BYTES = 480 * MIB  # that auto gives to dz and float32 dh
LEAST_BYTES = 256 * MIB  # what "min" may hold
LEVEL_CLASSES = 2559  # sampled at most for the levels of float16 rows
LEVEL_VOCAB = 10240  # the fewest classes that are sampled


def samples_levels(problem: Problem, algorithm: str) -> bool:
    """Whether the rows' references come from a sample of the classes. Other float16 heads are swept twice."""
    plain = problem.dtype == torch.float16 and not problem.transform.smooth.steps
    return plain and algorithm in ("single pass", "frozen") and problem.vocab >= LEVEL_VOCAB


def classes_beside(problem: Problem, algorithm: str) -> int:
    """Columns of products that are computed beside those of `plan.plan`: the sample, or the lse of a first sweep."""
    if samples_levels(problem, algorithm):
        return LEVEL_CLASSES
    return problem.vocab if problem.dtype == torch.float16 and algorithm in ("single pass", "frozen") else 0


def _keeps(problem: Problem) -> bool:
    """Whether the exponentials of the first block of a recompute are kept: it is as large as it may be then."""
    return problem.one_pass and problem.dtype == torch.bfloat16


def _candidate(problem: Problem, algorithm: str, tokens: int, vocab: int) -> Candidate:
    n, v, d, dtype, needs = problem.tokens, problem.vocab, problem.hidden, problem.dtype, problem.needs
    tokens, vocab = max(1, min(tokens, n)), max(1, min(vocab, v))
    if algorithm == "recompute" and not _keeps(problem):
        tokens, vocab = even_size(n, tokens), even_size(v, vocab)
    several = -(-n // tokens) > EXACT_SUMS
    wide_sums = several and problem.narrow and needs.w
    windows = Windows(tokens, vocab, torch.float32 if wide_sums else dtype)
    partial = 192 if problem.narrow else 640  # bytes of a row in partial sums: 6 to 33 slots, and of its statistics
    held = MIB + n * partial * (1 if any(needs) else 2)
    if any(needs) or not problem.narrow:
        held += tokens * -(-vocab // 64) * 64 * dtype.itemsize
        wide_dh = 2 if algorithm == "recompute" and vocab < v else 4 * (algorithm != "recompute")
        held += wide_dh * tokens * d * (needs.h and problem.narrow)
        held += 2 * v * d * wide_sums
    if samples_levels(problem, algorithm):
        held += LEVEL_CLASSES * (2 * d + 8) + 8 * v + 4 * n  # while the window is not there yet: an upper bound
    return Candidate(algorithm, windows, held)


def _equal_windows(n: int, most: int, fewest: int, hidden: int = 0) -> Iterator[int]:
    """Rows of equal windows of whole token blocks, from the largest that is allowed.

    Each is preceded by a taller one whose product E w [rows, hidden] fills whole waves of cuBLAS's tiles, if there is.
    """
    wave = WAVE // hidden // TOKEN_BLOCK * TOKEN_BLOCK if hidden else 0
    count = 1
    while True:
        tokens = min(n, -(-n // (TOKEN_BLOCK * count)) * TOKEN_BLOCK)
        if tokens <= most:
            waves = -(-tokens // wave) * wave if wave else 0
            if tokens < waves <= min(n, most, TALLER * tokens):
                yield waves
            yield max(1, tokens)
        if tokens <= max(fewest, TOKEN_BLOCK):
            return
        count += max(1, count // 8)


def _single_passes(problem: Problem) -> list[Candidate]:
    ways = [
        _candidate(problem, "single pass", at, problem.vocab)
        for at in _equal_windows(problem.tokens, MOST_WINDOW_TOKENS, FEWEST_TOKENS, problem.hidden)
    ]
    least, most = SUMMED_TOKENS
    return [way for way in ways if way.windows.accumulate == problem.dtype or least <= way.windows.tokens <= most]


def _recomputes(problem: Problem, most: int, keep: bool) -> list[Candidate]:
    """Blocks of dz that fill ``most`` bytes, tall ones first (dw is not added up then) unless a block is kept."""
    few = -(-problem.tokens // EXACT_SUMS)
    few = -(-few // TOKEN_BLOCK) * TOKEN_BLOCK
    step = TILE if keep else TOKEN_BLOCK  # blocks of equal size are cut to token blocks anyway (`even_size`)
    heights = [max(few, AUTO_TOKENS if keep else MOST_WINDOW_TOKENS)]
    while heights[-1] > 16:
        heights.append(max(16, heights[-1] // 2))
    ways = []
    for tokens in (min(at, max(problem.tokens, 1)) for at in heights):
        held = _candidate(problem, "recompute", tokens, 1).workspace_bytes - 64 * tokens * problem.dtype.itemsize
        room = min(max(most - held, 0), DZ_BYTES) if most else DZ_BYTES
        columns = room // (max(tokens, 1) * problem.dtype.itemsize) // step * step
        ways += [_candidate(problem, "recompute", tokens, at) for at in (columns, TOKEN_BLOCK) if at]
    return ways


def _auto_bytes(problem: Problem) -> int:
    """Bytes that ``auto`` may hold in a single pass: half of the logits, a quarter where they are many."""
    return problem.tokens * problem.vocab * problem.dtype.itemsize // (4 if problem.tokens >= 32768 else 2)


def _first(ways: list[Candidate], most: int, tokens: int) -> list[Candidate]:
    """The first way that holds no more than ``most`` bytes or has no more than ``tokens`` rows, and what follows."""
    for at, way in enumerate(ways):
        if way.workspace_bytes <= most or way.windows.tokens <= tokens:
            return ways[at:]
    return ways[-1:]


def triton_candidates(problem: Problem, memory: int, budget: int | None) -> tuple[list[Candidate], int | None]:
    """Ways to compute this head, the preferred first, and the bytes that they should fit in, None for any.

    ``memory`` is the option, ``budget`` what it allows in bytes (None: what suits the device).
    """
    ways = _preferred(problem, budget or 0)
    if memory == LEAST_MEMORY:
        budget = min(LEAST_BYTES, ways[0].workspace_bytes)
        ways = _preferred(problem, budget)
    if problem.float8 and not why_exact(problem, memory):
        ways = float8_candidates(problem, budget or ways[0].workspace_bytes * 3 // 2) + ways
    return ways, budget


def _preferred(problem: Problem, budget: int) -> list[Candidate]:
    needs, one_pass = problem.needs, problem.one_pass
    if not any(needs):
        if problem.narrow:
            return [_candidate(problem, "statistics", problem.tokens, problem.vocab)]
        candidates = [
            _candidate(problem, "statistics", at, problem.vocab)
            for at in _equal_windows(problem.tokens, MOST_WINDOW_TOKENS, 16)
        ]
        return candidates if budget else _first(candidates, DZ_BYTES, 16)
    frozen = not (needs.w or needs.cols)
    recompute = _recomputes(problem, budget or RECOMPUTE_BYTES, _keeps(problem))
    if one_pass and frozen:
        candidates = [
            _candidate(problem, "frozen", at, problem.vocab)
            for at in _equal_windows(problem.tokens, SUMMED_TOKENS[1], 16, problem.hidden)
        ]
        return [*(candidates if budget else _first(candidates, FROZEN_BYTES, FROZEN_TOKENS)), *recompute]
    if one_pass:
        candidates = _single_passes(problem)
        return [*(candidates if budget else _first(candidates, _auto_bytes(problem), AUTO_TOKENS)), *recompute]
    return recompute

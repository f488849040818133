"""The parallel arrangements of a head: the products of a rank, and the collectives that its step sends.

`benchmarks.cost_model` says what they cost. Bytes are those of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.shapes import Case

WIDE = 4  # bytes of a float32


class Collective(NamedTuple):
    kind: str  # a key of `cost_model.SCHEDULES`
    nbytes: float  # of the whole tensor: what an all_gather gives, what a reduce_scatter takes
    backward: bool = False


class Arrangement(NamedTuple):
    """One way to share the work of a head's step among ranks: a rank has 1/w of the classes, or of the tokens."""

    products: int  # of 2 N D V / w operations on a rank
    vocab: bool  # whether classes are shared; else tokens
    collectives: Callable[[Case, int], tuple[Collective, ...]]  # by the number of ranks
    about: str


# How the row statistics of a cross-entropy can be merged, float32: the maximum of [N] lse and then the sum of [2, N]
# exponentials and labels' logits; or what every rank has, lse in two numbers and labels' logits, handed to all of them.
MERGES: dict[str, Callable[[Case, int], tuple[Collective, ...]]] = {
    "two all-reduces": lambda c, w: (
        Collective("all_reduce", WIDE * c.tokens), Collective("all_reduce", 2 * WIDE * c.tokens),
    ),
    "one all-gather": lambda c, w: (Collective("all_gather", 3 * WIDE * c.tokens * w),),
}  # fmt: skip
MERGE = "one all-gather"  # what the package does


def statistics(case: Case, ranks: int) -> tuple[Collective, ...]:
    return MERGES[MERGE](case, ranks)


def of_a_group(case: Case, ranks: int) -> tuple[Collective, ...]:
    """The same where ranks first say how many classes they have, and what they were asked for, in 16 bytes each."""
    return Collective("all_gather", 16 * ranks), *statistics(case, ranks)


def three_reductions(case: Case, ranks: int) -> tuple[Collective, ...]:
    """What ``loss_parallel()`` sends: maximum, sum of exponentials and labels' log-probabilities, [N] float32 each."""
    return (Collective("all_reduce", WIDE * case.tokens),) * 3


def hidden(case: Case, itemsize: int | None = None) -> int:
    """Bytes of [N, D]."""
    return case.tokens * case.hidden * (itemsize or case.torch_dtype.itemsize)


def weight(case: Case) -> int:
    """Bytes of [V, D]."""
    return case.vocab * case.hidden * case.torch_dtype.itemsize


ARRANGEMENTS: dict[str, Arrangement] = {
    "group=": Arrangement(
        4, True, lambda c, w: (*of_a_group(c, w), Collective("all_reduce", hidden(c, WIDE), True)),
        "hidden states whole on every rank, dH summed in float32",
    ),
    "group=, vocab_size": Arrangement(
        3, True, lambda c, w: (*of_a_group(c, w), Collective("all_reduce", hidden(c, WIDE))),
        "the same where the shards are even: a window of tokens is gathered before its gradient products",
    ),
    "group=, dH in its dtype": Arrangement(
        4, True, lambda c, w: (*of_a_group(c, w), Collective("all_reduce", hidden(c), True)),
        "the same, dH summed in its own dtype",
    ),
    "sequence parallel": Arrangement(
        3, True,
        lambda c, w: (
            Collective("all_gather", hidden(c)), *statistics(c, w), Collective("reduce_scatter", hidden(c, WIDE), True),
        ),
        "tokens of the hidden states shared by the ranks, gathered before the head; dH scattered in float32",
    ),
    "loss_parallel": Arrangement(
        3, True, lambda c, w: (*three_reductions(c, w), Collective("all_reduce", hidden(c), True)),
        "torch's loss_parallel(): [N, V/w] logits exist on each rank",
    ),
    "loss_parallel, sequence parallel": Arrangement(
        3, True,
        lambda c, w: (
            Collective("all_gather", hidden(c)), *three_reductions(c, w), Collective("reduce_scatter", hidden(c), True),
        ),
        "the same with tokens shared",
    ),
    "logits gathered": Arrangement(
        3, True,
        lambda c, w: (
            Collective("all_gather", c.tokens * c.vocab * c.torch_dtype.itemsize),
            Collective("all_reduce", hidden(c), True),
        ),
        "ColwiseParallel with output Replicate where nothing is fused: [N, V] logits on every rank",
    ),
    "data parallel": Arrangement(
        3, False, lambda c, w: (Collective("all_reduce", weight(c), True),),
        "DDP: every rank has all classes and 1/w of the tokens; dW summed in its own dtype",
    ),
    "fully sharded": Arrangement(
        3, False,
        lambda c, w: (
            Collective("all_gather", weight(c)), Collective("all_gather", weight(c), True),
            Collective("reduce_scatter", weight(c), True),
        ),
        "FSDP2, resharded after the forward: all classes gathered twice, dW scattered",
    ),
}  # fmt: skip

"""Vocabulary-parallel heads: the shard that a rank holds, and the arguments that its ranks have to agree on.

The statistics of the shards are merged by ``shard_stats`` (`fusedhead.lowering.shards`), in one collective. An earlier
collective of two numbers a rank tells how many classes each rank holds, and whether all ranks make the same call.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fusedhead.lowering.shards  # noqa: F401  registers torch.ops.fusedhead.shard_span

Group = dist.ProcessGroup


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, and float64 for a float64 head: `kernels.contract.stat_dtype`, which Dynamo would not trace."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bounds(vocab_size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The classes [first, last) of a rank under DTensor's Shard(0): ceil(V / ranks) each, fewer for the last ranks."""
    each = -(-vocab_size // ranks)
    return min(rank * each, vocab_size), min((rank + 1) * each, vocab_size)


def wrong_shard(classes: int, group: Group, vocab_size: int | None) -> str:
    """The error of a shard whose number of classes contradicts ``vocab_size``, "" if there is none."""
    if vocab_size is None:
        return ""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    first, last = bounds(vocab_size, ranks, rank)
    if classes == last - first:
        return ""
    expected = f"{last - first} of the {vocab_size} rows that vocab_size names"
    return f"rank {rank} of {ranks} must hold {expected}. Got: {classes}; without vocab_size any split is taken"


def span(h: Tensor, classes: int, group: Group, facts: Hashable) -> Tensor:
    """[2] int64: the first class of this rank and the number of all classes, from the numbers that all ranks hold.

    ``facts`` is what the ranks must agree on, with the shape and the dtype of ``h``. Raises ShardMismatch on every rank
    where one differs (on a GPU an assertion fails, since nobody waits for the device).
    """
    mark = zlib.crc32(repr(facts).encode())
    return torch.ops.fusedhead.shard_span(h, classes, mark, group.group_name)  # type: ignore[no-any-return]


def refuse_with_all(wrong: str, h: Tensor, classes: int, group: Group) -> None:
    """Raise ValueError here, and let the other ranks, which may find nothing wrong, raise too instead of waiting."""
    try:
        span(h, classes, group, (wrong, dist.get_rank(group)))
    finally:
        raise ValueError(wrong)


def reduction_of(dtype: torch.dtype | None) -> str:
    """A dtype in which gradients are summed over the ranks, as the ops take it."""
    names: dict[Any, str] = {None: "own", torch.float32: "wide"}
    return names.get(dtype) or str(dtype).removeprefix("torch.")

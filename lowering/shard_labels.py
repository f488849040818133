"""The labels of a head in shards: which of them a rank holds, those of all ranks, and one that is no class.

Rank r holds the classes [first, first + V_r) of V.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedhead.lowering.checks import LabelOutOfRange
from fusedhead.lowering.shard_merge import gathered

CELLS = 64


def in_shard(y: Tensor, first: Any, classes: int) -> tuple[Tensor, Tensor]:
    """(which labels [N, K] are of this shard, their place in it; for those of others one of its first `CELLS`).

    An engine computes a label's entry by itself and adds it to dw. One place for all would be a long sum in float32.
    """
    inside = (y >= first) & (y < first + classes)
    spare = torch.arange(len(y), device=y.device) % max(1, min(classes, CELLS))
    return inside, torch.where(inside, y - first, spare[:, None])


def labels_of_all(y: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[N, R K], the labels [N, K] of all ranks."""
    return gathered(y, group).movedim(0, 1).reshape(len(y), -1)


def wrong_label(y: Tensor, vocab: Any) -> Tensor:
    """[2] int32: whether a label is no class of any rank, and one that is not."""
    if not y.numel():
        return y.new_zeros(2, dtype=torch.int32)
    least, most = y.aminmax()
    one = torch.where(least < 0, least, most).clamp(-(1 << 31), (1 << 31) - 1)
    return torch.stack((((least < 0) | (most >= vocab)).to(one.dtype), one)).to(torch.int32)


def require_labels(flags: Tensor, vocab: Any) -> None:
    """Raise LabelOutOfRange on every rank where one has a label that is no class. ``flags`` [R, 2] of all ranks."""
    if flags.is_cpu:
        wrong = flags[flags[:, 0] != 0]
        if len(wrong):
            raise LabelOutOfRange(f"label {int(wrong[0, 1])} is out of range: labels must lie in [0, {int(vocab) - 1}]")
    else:
        torch.ops.aten._assert_async.msg((flags[:, 0] == 0).all(), "a label is out of range")

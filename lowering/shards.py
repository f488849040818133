"""The ops of a head whose vocabulary lies in shards on the ranks of a process group.

Rank r holds W_r [V_r, D], the classes [first, first + V_r) of V. Hidden states are whole and equal on all ranks; so are
the statistics that come out.

    shard_stats           one sweep of this rank's columns and the merge, in one collective: the statistics of all
                          columns in the order of `contract.STATS`, and this rank's own that the backward reads
    shard_stats_backward  one sweep: dw, dcols of this rank's columns; dh (and drows) summed over the ranks
    shard_span            [first, V] as a tensor, from what each rank says that it holds; all fail where they disagree
    whole_vocab           stands for the whole weight while a graph is read; it is never run

The collectives are inside: one that nothing reads is dropped with its op, and no sweep is repeated for it. Those of one
op after another are issued in one order on all ranks where each is given the ``token`` of the one before, forward and,
through the token's gradient, backward: a compiler could order independent calls by the sizes of this rank's shard.

``reduce`` says how dh is summed: "wide" in float32, "own" in its dtype as stock torch does, in a dtype of that name, ""
not at all, for `gather_tokens` to sum. But for "own" each rank's part comes out of its sweep in float32 and is rounded
once, after the sum; with "" it keeps that dtype on the way to a ``recipient`` (`hidden_sum`).

With ``own_labels`` each rank may have labels of its own, whose logits are then picked on all ranks, and one more
collective sends them. Without, labels are equal on all ranks; where they are not, every rank adds what it has of its
own, as torch's ``loss_parallel`` does. A label that is no class raises on every rank alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fusedhead.kernels.contract import DIFFERENTIABLE_STATS, SAVED_STATS, STATS, stat_dtype, with_companions
from fusedhead.lowering import fakes, ops, ranges, shard_autograd
from fusedhead.lowering.autograd import DIFFERENTIATED_ONCE
from fusedhead.lowering.checks import parse_stats
from fusedhead.lowering.registration import register_op
from fusedhead.lowering.shard_labels import in_shard, labels_of_all, require_labels, wrong_label
from fusedhead.lowering.shard_merge import SHARD_MISMATCH, Part, ShardMismatch, gathered, gathered_parts, merged

_HEAD = "Tensor h, Tensor w, Tensor y, Tensor cols, Tensor rows, Tensor u"
_NEEDS = "bool need_h, bool need_w, bool need_cols, bool need_rows"
_PLACE = "int first, int vocab, str group, str reduce"
_ORDER = "Tensor? span=None, Tensor? after=None"
_OWN = ", ".join(f"Tensor own_{name}" for name in SAVED_STATS)
SHARD_SCHEMAS = {
    "shard_stats": f"({_HEAD}, str transform, str stats, int memory, {_PLACE}, bool own_labels, {_ORDER}, "
    f"Tensor? recipient=None) -> ({', '.join(f'Tensor {name}' for name in STATS)}, {_OWN}, Tensor token)",
    "shard_stats_backward": f"({', '.join(f'Tensor g_{name}' for name in DIFFERENTIABLE_STATS)}, {_HEAD}, {_OWN}, "
    f"str transform, int memory, {_NEEDS}, {_PLACE}, {_ORDER}) -> "
    "(Tensor dh, Tensor dw, Tensor dcols, Tensor drows, Tensor token)",
    "shard_span": "(Tensor like, int classes, int mark, str group) -> Tensor",
    "whole_vocab": "(Tensor w, int first, int vocab, str group, bool reduce, bool own_labels) -> Tensor",
}


def group_of(name: str) -> Any:
    """The process group of a name that a graph holds. Raises RuntimeError where this torch does not say."""
    resolve = getattr(dist.distributed_c10d, "_resolve_process_group", None)
    if resolve is None:
        raise RuntimeError(f"torch {torch.__version__} does not find a process group by its name ({name!r})")
    return resolve(name)


def class_weight(h: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """[], the sum of the class weights u of this rank's columns; their number where there are none."""
    return u.sum() if u.numel() else h.new_full((), float(w.shape[0]), dtype=stat_dtype(h.dtype))


def _no_columns(h: Tensor, labels: int) -> dict[str, Tensor]:
    """The statistics of a rank that holds no class."""
    n, wide = h.shape[0], stat_dtype(h.dtype)
    zero, least = h.new_zeros(n, dtype=wide), h.new_full((n,), float("-inf"), dtype=wide)
    stats = dict.fromkeys(STATS, zero) | {"lse": least, "max": least}
    return stats | {"picked": h.new_zeros((n, labels), dtype=wide), "argmax": h.new_zeros(n, dtype=torch.int64)}


def _swept(
    head: tuple, y: Tensor, needed: frozenset[str], transform: str, memory: int, first: Any
) -> dict[str, Tensor]:
    """The statistics of this rank's columns by name. Labels ``y`` [N, K] are of the whole vocabulary."""
    h, w, cols, rows, u = head
    if w.shape[0] == 0:
        stats = _no_columns(h, y.shape[1])
        return {name: stats[name] for name in needed}
    inside, cell = in_shard(y, first, w.shape[0])
    results = ops._head_stats(h, w, cell, cols, rows, u, transform, ",".join(sorted(needed)), memory)
    stats = {name: result for name, result in zip(STATS, results) if name in needed}
    if "picked" in stats:
        stats["picked"] = torch.where(inside, stats["picked"], 0)
    if "argmax" in stats:
        stats["argmax"] = stats["argmax"] + first
    return stats


def _shard_stats(
    h: Tensor,
    w: Tensor,
    y: Tensor,
    cols: Tensor,
    rows: Tensor,
    u: Tensor,
    transform: str,
    stats: str,
    memory: int,
    first: int,
    vocab: int,
    group: str,
    reduce: str,
    own_labels: bool,
    span: Tensor | None = None,
    after: Tensor | None = None,
    recipient: Tensor | None = None,
) -> tuple[Tensor, ...]:
    of, want = group_of(group), parse_stats(stats)
    at, classes = (first, vocab) if span is None else (span[0], span[1])
    needed = with_companions(want | {"lse"} if "spread" in want else want)
    needed |= {"max", "argmax"} if want & {"max", "argmax"} else set()
    rank, labels = dist.get_rank(of), y
    if own_labels and "picked" in want:
        labels = labels_of_all(y, of)
    head = (h, w, cols, rows, u)
    local = _swept(head, labels, needed, transform, memory, at)
    weight = class_weight(h, w, u)
    parts, flags = gathered_parts(Part(weight, **local), wrong_label(y, classes), of)
    require_labels(flags, classes)
    total = merged(parts)
    if labels is not y:
        total["picked"] = total["picked"].view(len(y), -1, y.shape[1])[:, rank].contiguous()
    names, none = with_companions(want), h.new_empty(0, dtype=weight.dtype)
    absent = {"argmax": y.new_empty(0)}
    results = [total[name] if name in names else absent.get(name, none.clone()) for name in STATS]
    saved = [local[name].clone() if name in needed else none.clone() for name in SAVED_STATS]
    return *results, *saved, h.new_zeros(1, dtype=weight.dtype)


def part_dtype(dtype: torch.dtype, reduce: str) -> torch.dtype:
    """The dtype of a rank's part of a gradient of this dtype, before it is summed."""
    return dtype if reduce == "own" else stat_dtype(dtype)


def _summed(part: Tensor, dtype: torch.dtype, group: str, reduce: str) -> Tensor:
    """A rank's part summed over the ranks, as ``reduce`` says, in ``dtype``; the part is written to where it can."""
    named = {"wide": stat_dtype(dtype), "own": dtype}
    total = part.to(named[reduce] if reduce in named else getattr(torch, reduce)).contiguous()
    dist.all_reduce(total, group=group_of(group))
    return total.to(dtype)


class ShardBackwardSettings(NamedTuple):
    """The arguments of `shard_stats_backward` that follow its tensors, by their names in the schema."""

    transform: str
    memory: int
    need_h: bool
    need_w: bool
    need_cols: bool
    need_rows: bool
    first: int
    vocab: int
    group: str
    reduce: str
    span: Tensor | None = None
    after: Tensor | None = None

    @property
    def needs(self) -> tuple[bool, bool, bool, bool]:
        return self.need_h, self.need_w, self.need_cols, self.need_rows


def _shard_stats_backward(*args: Any) -> tuple[Tensor, ...]:
    grads, operands, local, rest = shard_autograd.split_backward(args)
    return _gradients(dict(zip(DIFFERENTIABLE_STATS, grads)), operands, local, ShardBackwardSettings(*rest))


def _gradients(
    grads: dict[str, Tensor], operands: Sequence[Tensor], local: Any, settings: ShardBackwardSettings
) -> tuple[Tensor, ...]:
    (h, w, y, cols, rows, u), needs, span = operands, settings.needs, settings.span
    dtype = part_dtype(h.dtype, settings.reduce)
    if w.shape[0] == 0:
        gradients = [torch.zeros_like(x) if need else x.new_empty(0) for x, need in zip((h, w, cols, rows), needs)]
        gradients[0] = gradients[0].to(dtype)
    else:
        inside, cell = in_shard(y, settings.first if span is None else span[0], w.shape[0])
        if grads["picked"].numel():
            grads["picked"] = torch.where(inside, grads["picked"], 0)
        gradients = list(
            ops._head_stats_backward(
                *grads.values(),
                h,
                w,
                cell,
                cols,
                rows,
                u,
                *local,
                settings.transform,
                settings.memory,
                *needs,
                0,
                None,
                dtype,
            )
        )
    if settings.need_h and settings.reduce:
        gradients[0] = _summed(gradients[0], h.dtype, settings.group, settings.reduce)
    if settings.need_rows:
        gradients[3] = _summed(gradients[3], rows.dtype, settings.group, "wide")
    return *gradients, h.new_zeros(1, dtype=stat_dtype(h.dtype))


def _shard_span(like: Tensor, classes: int, mark: int, group: str) -> Tensor:
    of = group_of(group)
    mark = zlib.crc32(f"{mark} {tuple(like.shape)} {like.dtype}".encode())
    said = torch.stack([like.new_full((), number, dtype=torch.int64) for number in (classes, mark)])
    counts, marks = gathered(said, of).unbind(1)
    if like.is_cpu:
        if bool((marks != mark).any()):
            raise ShardMismatch(SHARD_MISMATCH)
    else:
        torch.ops.aten._assert_async.msg((marks == mark).all(), SHARD_MISMATCH)
    return torch.stack((counts[: dist.get_rank(of)].sum(), counts.sum()))


def _whole_vocab(w: Tensor, first: int, vocab: int, group: str, reduce: bool, own_labels: bool) -> Tensor:
    raise AssertionError("whole_vocab stands for a weight while a graph is read, and is never run")


def _stats_fake(h: Any, w: Any, y: Any, cols: Any, rows: Any, u: Any, transform: Any, stats: str, *_: Any) -> Any:
    whole = dict(zip(STATS, fakes.fake_head_stats(h, w, y, cols, rows, u, transform, stats, 0)))
    asked = f"{stats},lse" if "spread" in parse_stats(stats) else stats
    local = dict(zip(STATS, fakes.fake_head_stats(h, w, y, cols, rows, u, transform, asked, 0)))
    return *whole.values(), *(local[name] for name in SAVED_STATS), h.new_empty(1, dtype=stat_dtype(h.dtype))


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    _, (h, w, _, cols, rows, _), _, rest = shard_autograd.split_backward(args)
    settings = ShardBackwardSettings(*rest)
    dh_dtype = part_dtype(h.dtype, "") if settings.need_h and not settings.reduce else h.dtype
    dtypes = [dh_dtype, w.dtype, cols.dtype, rows.dtype]
    operands = zip((h, w, cols, rows), settings.needs, dtypes)
    grads = [x.new_empty(x.shape if need else 0, dtype=dtype) for x, need, dtype in operands]
    return *grads, h.new_empty(1, dtype=stat_dtype(h.dtype))


def _span_fake(like: Tensor, classes: Any, mark: int, group: str) -> Tensor:
    return like.new_empty(2, dtype=torch.int64)


def _whole_fake(w: Tensor, first: int, vocab: int, group: str, reduce: bool, own_labels: bool) -> Tensor:
    return w.new_empty([vocab, *w.shape[1:]])


def _setup_nothing(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pass


def _never(ctx: Any, d: Tensor) -> NoReturn:
    raise AssertionError("whole_vocab stands for a weight while a graph is read, and is never run")


_HEADS = ("shard_stats", "shard_stats_backward")  # those that compute one
_PARTS: dict[str, Any] = {
    "shard_stats": (_shard_stats, _stats_fake, shard_autograd.SHARD_STATS),
    "shard_stats_backward": (_shard_stats_backward, _backward_fake, DIFFERENTIATED_ONCE),
    "shard_span": (_shard_span, _span_fake, None),
    "whole_vocab": (_whole_vocab, _whole_fake, (_setup_nothing, _never)),
}
for _name, (_implementation, _fake, _gradient) in _PARTS.items():
    if _name in _HEADS:
        _implementation = ranges.ranged(_name, ranges.operands_named(SHARD_SCHEMAS[_name]), _implementation)
    register_op(_name, SHARD_SCHEMAS[_name], _implementation, _fake, _gradient)

"""The ops of a head whose vocabulary lies in shards on the ranks of a process group.

Rank r holds W_r [V_r, D], the classes [first, first + V_r) of V. Hidden states and labels are whole and equal on all
ranks; so are the statistics that come out.

    shard_stats           one sweep of this rank's columns and the merge, in two collectives: the statistics of all
                          columns in the order of `contract.STATS`, and this rank's own that the backward reads
    shard_stats_backward  one sweep: dw, dcols of this rank's columns; dh (and drows) summed over the ranks in float32
    gather_tokens         hidden states whose tokens lie in equal shards, whole; its gradient is summed and scattered,
                          in float32, by ``scatter_tokens``
    whole_vocab           stands for the whole weight while a graph is read; it is never run

The collectives are inside: one that nothing reads is dropped with its op, and no sweep is repeated for it. A backward
takes the gradients of this rank's statistics from those of all by numbers [N] that it has, without a collective.

With ``reduce`` off dh is left as this rank's part, for `gather_tokens` to sum. ``facts`` is a number that the ranks
must agree on, as they must on the labels: where they differ, all of them raise ShardMismatch instead of adding up what
does not belong together (on a GPU an assertion fails, since nobody waits for the device). This file knows no graphs.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fusedhead.kernels.contract import STATS, stat_dtype
from fusedhead.lowering import fakes, ops
from fusedhead.lowering.autograd import DIFFERENTIATED_ONCE
from fusedhead.lowering.checks import LabelOutOfRange, parse_stats
from fusedhead.lowering.shard_merge import Part, merged

_HEAD = "Tensor h, Tensor w, Tensor y, Tensor cols, Tensor rows, Tensor u"
_NEEDS = "bool need_h, bool need_w, bool need_cols, bool need_rows"
SHARD_SCHEMAS = {
    "shard_stats": f"({_HEAD}, str transform, str stats, int memory, int first, int vocab, str group, int facts, "
    "bool reduce) -> (Tensor lse, Tensor picked, Tensor sum, Tensor entropy, Tensor max, Tensor argmax, "
    "Tensor lse_low, Tensor spread, Tensor own_lse, Tensor own_low, Tensor own_entropy)",
    "shard_stats_backward": "(Tensor g_lse, Tensor g_picked, Tensor g_sum, Tensor g_entropy, "
    f"{_HEAD}, Tensor own_lse, Tensor own_low, Tensor own_entropy, str transform, int memory, {_NEEDS}, int first, "
    "str group, bool reduce) -> (Tensor dh, Tensor dw, Tensor dcols, Tensor drows)",
    "gather_tokens": "(Tensor x, int dim, int ranks, str group) -> Tensor",
    "scatter_tokens": "(Tensor x, int dim, int ranks, str group) -> Tensor",
    "whole_vocab": "(Tensor w, int first, int vocab, str group, bool reduce) -> Tensor",
}


MERGED = tuple(name for name in STATS if name != "variance")  # whose merge is not a sum of what each rank has
OWN = ("lse", "lse_low", "entropy")  # statistics of this rank's columns that its backward reads


def group_of(name: str) -> Any:
    """The process group of a name that a graph holds. Raises RuntimeError where this torch does not say."""
    resolve = getattr(dist.distributed_c10d, "_resolve_process_group", None)
    if resolve is None:
        raise RuntimeError(f"torch {torch.__version__} does not find a process group by its name ({name!r})")
    return resolve(name)


def in_shard(y: Tensor, first: int, classes: int) -> tuple[Tensor, Tensor]:
    """(which labels [N, K] are of this shard, their place in it, 0 for those of others)."""
    here = (y >= first) & (y < first + classes)
    return here, torch.where(here, y - first, 0)


def require_labels(y: Tensor, vocab: int) -> None:
    """Raise LabelOutOfRange for a label that is no class of any rank, on all ranks alike."""
    if y.is_cpu:
        wrong = y[(y < 0) | (y >= vocab)]
        if wrong.numel():
            raise LabelOutOfRange(f"label {int(wrong[0])} is out of range: labels must lie in [0, {vocab - 1}]")
    elif y.numel():
        torch.ops.aten._assert_async.msg(((y >= 0) & (y < vocab)).all(), "a label is out of range")


def _no_columns(h: Tensor, labels: int) -> tuple[Tensor, ...]:
    """The statistics of a rank that holds no class, in the order of `MERGED`."""
    n, wide = h.shape[0], stat_dtype(h.dtype)
    least = h.new_full((n,), float("-inf"), dtype=wide)
    zero = h.new_zeros(n, dtype=wide)
    picked = h.new_zeros((n, labels), dtype=wide)
    return least, picked, zero, zero, least, h.new_zeros(n, dtype=torch.int64), zero, zero


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
    facts: int,
    reduce: bool,
) -> tuple[Tensor, ...]:
    want, needed = parse_stats(stats), parse_stats(stats)
    needed |= {"lse", "lse_low"} if want & {"lse", "entropy", "spread"} else set()
    needed |= {"max", "argmax"} if want & {"max", "argmax"} else set()
    require_labels(y, vocab)
    here, cell = in_shard(y, first, w.shape[0])
    if w.shape[0] == 0:
        own = dict(zip(MERGED, _no_columns(h, y.shape[1])))
    else:
        swept = ops._head_stats(h, w, cell, cols, rows, u, transform, ",".join(needed), memory)
        own = dict(zip(STATS, swept))
    found = {name: own[name] for name in MERGED if name in needed}
    if "picked" in found:
        found["picked"] = torch.where(here, found["picked"], 0)
    weight = u.sum() if u.numel() else h.new_full((), float(w.shape[0]), dtype=stat_dtype(h.dtype))
    total = merged(Part(first if w.shape[0] else vocab, weight, **found), y, facts, group_of(group))
    given = want | ({"lse", "lse_low"} if want & {"lse", "entropy"} else set())
    results = [total[name] if name in given else own[name].new_empty(0) for name in MERGED]
    return *results, *(found[name] if name in given else h.new_empty(0, dtype=weight.dtype) for name in OWN)


def _summed(x: Tensor, group: str) -> Tensor:
    """x summed over the ranks, in float32 at least; x itself is written to where it is as wide."""
    wide = x.to(stat_dtype(x.dtype)).contiguous()
    dist.all_reduce(wide, group=group_of(group))
    return wide.to(x.dtype)


def _shard_stats_backward(
    g_lse: Tensor,
    g_picked: Tensor,
    g_sum: Tensor,
    g_entropy: Tensor,
    h: Tensor,
    w: Tensor,
    y: Tensor,
    cols: Tensor,
    rows: Tensor,
    u: Tensor,
    own_lse: Tensor,
    own_low: Tensor,
    own_entropy: Tensor,
    transform: str,
    memory: int,
    need_h: bool,
    need_w: bool,
    need_cols: bool,
    need_rows: bool,
    first: int,
    group: str,
    reduce: bool,
) -> tuple[Tensor, ...]:
    needs = (need_h, need_w, need_cols, need_rows)
    if w.shape[0] == 0:
        grads = [torch.zeros_like(x) if need else x.new_empty(0) for x, need in zip((h, w, cols, rows), needs)]
    else:
        here, cell = in_shard(y, first, w.shape[0])
        g_picked = torch.where(here, g_picked, 0) if g_picked.numel() else g_picked
        none = h.new_empty(0)  # of the variance
        saved = (own_lse, own_low, own_entropy, none, transform, memory, *needs)
        grads = list(
            ops._head_stats_backward(g_lse, g_picked, g_sum, g_entropy, none, h, w, cell, cols, rows, u, *saved)
        )
    if need_h and reduce:
        grads[0] = _summed(grads[0], group)
    if need_rows:
        grads[3] = _summed(grads[3], group)
    return tuple(grads)


def _gather_tokens(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    part = x.movedim(dim, 0).contiguous()
    whole = part.new_empty((ranks * part.shape[0], *part.shape[1:]))
    dist.all_gather_into_tensor(whole, part, group=group_of(group))
    return whole.movedim(0, dim).contiguous()


def _scatter_tokens(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    whole = x.to(stat_dtype(x.dtype)).movedim(dim, 0).contiguous()
    part = whole.new_empty((whole.shape[0] // ranks, *whole.shape[1:]))
    dist.reduce_scatter_tensor(part, whole, group=group_of(group))
    return part.to(x.dtype).movedim(0, dim).contiguous()


def _whole_vocab(w: Tensor, first: int, vocab: int, group: str, reduce: bool) -> Tensor:
    raise AssertionError("whole_vocab stands for a weight while a graph is read, and is never run")


def _stats_fake(h: Any, w: Any, y: Any, cols: Any, rows: Any, u: Any, transform: Any, stats: Any, *_: Any) -> Any:
    merged_stats = fakes.fake_head_stats(h, w, y, cols, rows, u, transform, stats, 0)[: len(MERGED)]
    return *merged_stats, *(torch.empty_like(merged_stats[STATS.index(name)]) for name in OWN)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    h, w, _, cols, rows = args[4:9]
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip((h, w, cols, rows), args[15:19]))


def _resized(x: Tensor, dim: int, size: Any) -> Tensor:
    return x.new_empty([size if d == dim else length for d, length in enumerate(x.shape)])


def _gather_fake(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    return _resized(x, dim, x.shape[dim] * ranks)


def _scatter_fake(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    return _resized(x, dim, x.shape[dim] // ranks)


def _whole_fake(w: Tensor, first: int, vocab: int, group: str, reduce: bool) -> Tensor:
    return _resized(w, 0, vocab)


def _setup_stats(ctx: Any, inputs: tuple, output: tuple) -> None:
    h, w, y, cols, rows, u, ctx.transform, _, ctx.memory, ctx.first, _, ctx.group, _, ctx.reduce = inputs
    lse, _, _, entropy, top, where, lse_low, spread, *own = output
    ctx.save_for_backward(h, w, y, cols, rows, u, lse, lse_low, entropy, *own)
    ctx.mark_non_differentiable(top, where, lse_low, spread, *own)
    ctx.set_materialize_grads(False)


def _upstream_of_own(
    g_lse: Tensor | None, g_entropy: Tensor | None, all_ranks: list[Tensor], own: list[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of this rank's lse_r and H_r from those of the lse and the entropy H of all, p_r = exp(lse_r - lse).

    d lse = Σ p_r d lse_r        d H = Σ p_r d H_r + p_r (H_r - log p_r - H) d lse_r
    """
    (lse, low, entropy), (own_lse, own_low, own_entropy) = all_ranks, own
    if g_lse is None and g_entropy is None:
        return None, None
    log = (own_lse - lse) + (own_low - low)
    mass = log.exp() + 0 * lse  # NaN where a logit is +inf, on ranks without it too
    found = None if g_lse is None else g_lse * mass
    if g_entropy is None:
        return found, None
    slope = g_entropy * torch.where(mass == 0, 0, mass * ((own_entropy - log) - entropy))
    return slope if found is None else found + slope, g_entropy * torch.where(mass == 0, 0, mass)


def _backward_stats(ctx: Any, *upstream: Tensor | None) -> tuple:
    h, w, y, cols, rows, u, *saved = ctx.saved_tensors
    g_lse, g_picked, g_sum, g_entropy = upstream[:4]
    needs = [ctx.needs_input_grad[at] for at in (0, 1, 3, 4)]
    if not any(needs) or all(g is None for g in upstream[:4]):
        return (None,) * 14
    g_lse, g_entropy = _upstream_of_own(g_lse, g_entropy, saved[:3], saved[3:])
    given = [saved[0].new_empty(0) if g is None else g for g in (g_lse, g_picked, g_sum, g_entropy)]
    grads = torch.ops.fusedhead.shard_stats_backward(
        *given, h, w, y, cols, rows, u, *saved[3:], ctx.transform, ctx.memory, *needs, ctx.first, ctx.group, ctx.reduce
    )
    dh, dw, dcols, drows = (g if need else None for g, need in zip(grads, needs))
    return dh, dw, None, dcols, drows, *(None,) * 9


def _setup_gather(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.dim, ctx.ranks, ctx.group = inputs


def _backward_gather(ctx: Any, d: Tensor) -> tuple:
    return torch.ops.fusedhead.scatter_tokens(d, ctx.dim, ctx.ranks, ctx.group), None, None, None


def _setup_nothing(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pass


def _never(ctx: Any, d: Tensor) -> NoReturn:
    raise AssertionError("whole_vocab stands for a weight while a graph is read, and is never run")


_PARTS: dict[str, Any] = {
    "shard_stats": (_shard_stats, _stats_fake, (_setup_stats, _backward_stats)),
    "shard_stats_backward": (_shard_stats_backward, _backward_fake, DIFFERENTIATED_ONCE),
    "gather_tokens": (_gather_tokens, _gather_fake, (_setup_gather, _backward_gather)),
    "scatter_tokens": (_scatter_tokens, _scatter_fake, DIFFERENTIATED_ONCE),
    "whole_vocab": (_whole_vocab, _whole_fake, (_setup_nothing, _never)),
}
for _name, (_implementation, _fake, (_setup, _backward)) in _PARTS.items():
    torch.library.define(f"fusedhead::{_name}", SHARD_SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"fusedhead::{_name}", "default", _implementation)
    torch.library.register_fake(f"fusedhead::{_name}", _fake)
    torch.library.register_autograd(f"fusedhead::{_name}", _backward, setup_context=_setup)

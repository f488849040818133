"""``fusedhead.linear_cross_entropy``: the loss of a head as a function, for code that calls one.

    z_i = softcap · tanh((h_i Wᵀ + b) / softcap)                       without softcap: h_i Wᵀ + b
    l_i = (1 - ε) w_y (lse_i - z_iy) + ε/V Σ_v w_v (lse_i - z_iv)        0 where y_i is ignored
    mean: Σ l_i / Σ w_y + ζ Σ lse_i² / n       sum: Σ l_i + ζ Σ lse_i²       none: l_i + ζ lse_i²

``F.cross_entropy(F.linear(input, linear_weight, bias), target)`` in one call that never builds the [N, V] logits: ε is
the label smoothing and w the class weights, as torch defines them, ζ PaLM's z-loss (arXiv 2204.02311), and n counts the
tokens that are not ignored. It works on plain tensors, eager or compiled. With ``group``, every rank passes its own
rows of the weight, and three numbers a token travel instead of its logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fusedhead.lowering.ops
import fusedhead.lowering.shard_loss  # noqa: F401  registers torch.ops.fusedhead
from fusedhead.functional.vocab_parallel import (
    bounds,
    reduction_of,
    refuse_with_all,
    span,
    statistics_dtype,
    wrong_shard,
)
from fusedhead.kernels.contract import LOSS_OUTPUTS, STATS
from fusedhead.lowering.checks import LabelOutOfRange
from fusedhead.lowering.gain import computed, times_gain

REDUCTIONS = ("none", "mean", "sum")
WORKSPACE: dict[str | int, int] = {"auto": 0, "min": -1}  # as the ops take it; else MiB
HALF_DTYPES = (torch.bfloat16, torch.float16)


class Loss(NamedTuple):
    """The settings of the loss, independent of the logits."""

    counts: Tensor  # [N] bool, False where the label is ignored
    label_weight: Tensor  # [N] class weight of the label, 0 where it is ignored
    classes: Any  # V, of all ranks
    total_weight: Any  # Σ_v w_v over all classes; V without class weights
    smoothing: float
    z_loss: float
    reduction: str


class Operands(NamedTuple):
    """The tensors of an op call (`fusedhead.kernels.contract.Head`), and the chain as text."""

    h: Tensor  # [N, D]
    w: Tensor  # [V, D], this rank's rows
    y: Tensor  # [N, 1] int64, an index into them
    cols: Tensor  # [0 or 1, V] float32
    rows: Tensor  # [0, N]
    u: Tensor  # [V] or [0]
    transform: str


class LossStatistics(NamedTuple):
    """The statistics of a row that the loss reads, all float32 (float64 for a float64 head)."""

    lse: Tensor  # [N]
    lse_low: Tensor  # [N], constant to autograd
    picked: Tensor  # [N, 1]
    sum: Tensor | None = None  # [N]
    spread: Tensor | None = None  # [N], constant to autograd


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    memory: str | int = "auto",
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
) -> Tensor:
    """The cross entropy of ``F.linear(input, linear_weight, bias)`` and ``target``, without those logits.

    input [..., D] hidden states; linear_weight [V, D]; target [...] int64 class indices; bias [V]; weight [V] class
    weights. Returns a scalar, or [...] for ``reduction="none"``, in input's dtype (float32 under autocast). ``memory``
    is the workspace as in ``fusedhead.memory``: "auto", "min" or a number of MiB.

    With ``group``, linear_weight and bias are this rank's rows of a [V, D] weight in the order of the ranks; uneven and
    empty shards are fine. Everything else is whole and equal on all ranks, and so is the result. The gradient of input
    is summed over the ranks once, in ``reduce_dtype`` (None: in its own). ``vocab_size`` says that the rows are what
    DTensor's Shard(0) gives this rank of so many classes; a scalar loss and its gradients then take one sweep.

    Raises ValueError for what does not fit together, LabelOutOfRange (an IndexError and a RuntimeError) for a label
    outside [0, V) that is not ``ignore_index`` (on a GPU an assertion there), ShardMismatch on every rank where the
    ranks disagree.
    """
    wrong = wrong_setting(reduction, label_smoothing, softcap, memory)
    wrong = wrong or wrong_operand(input, linear_weight, target, bias)
    if wrong and group is None:
        raise ValueError(wrong)
    budget = int(WORKSPACE.get(memory, memory))
    result_dtype = torch.float32 if torch.is_autocast_enabled(input.device.type) else input.dtype
    h, w, bias = in_dtype_of_products(input.reshape(-1, input.shape[-1]), linear_weight, bias)
    first: Any = 0
    classes: Any = w.shape[0]
    shard: Tensor | None = None
    if group is not None:
        wrong = wrong or wrong_shard(w.shape[0], group, vocab_size)
        settings = (reduction, ignore_index, label_smoothing, z_loss, softcap, weight is None, bias is None)
        if wrong:
            refuse_with_all(wrong, h, w.shape[0], group)
        # facts that decide the collectives: whether dh is summed, and whether one sweep in equal windows serves
        learnt = torch.is_grad_enabled() and h.requires_grad
        in_one_sweep = None if vocab_size is None else (torch.is_grad_enabled() and w.requires_grad, budget)
        shard = span(h, w.shape[0], group, (vocab_size, str(reduce_dtype), learnt, in_one_sweep, *settings))
        if vocab_size is None:
            first, classes = shard[0], shard[1]
        else:
            first, classes = bounds(vocab_size, dist.get_world_size(group), dist.get_rank(group))[0], vocab_size
    labels = target.reshape(-1)
    counts = labels != ignore_index
    if group is None:  # else on all ranks alike, where the statistics are merged
        require_labels_in_range(labels, counts, classes)
    wide = statistics_dtype(h.dtype)
    label_weight = counts.to(wide)
    if weight is not None:
        label_weight = label_weight * weight.to(wide)[torch.where(counts, labels, 0)]
    total_weight = classes if weight is None else weight.sum(dtype=wide)
    loss = Loss(counts, label_weight, classes, total_weight, label_smoothing, z_loss, reduction)
    shard_weight = weight
    if weight is not None and group is not None:
        shard_weight = weight[first + torch.arange(w.shape[0], device=weight.device)]
    head = head_operands(h, w, torch.where(counts, labels, 0), bias, shard_weight, softcap)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (h, w, head.cols))
    place: tuple[Any, ...] = ()
    if group is not None:
        place = (first, classes, group.group_name, reduction_of(reduce_dtype))
    if reduction != "none" and learns and (group is None or vocab_size is not None):
        value = with_gradients(head, loss, budget, place)
    elif group is not None and shard is not None:
        value = reduced(of_all_ranks(head, shard, loss, budget, group, reduction_of(reduce_dtype)), loss)
    else:
        value = reduced(swept_stats(head, loss, budget), loss)
    value = value.to(result_dtype)
    return value.reshape(target.shape) if reduction == "none" else value


def wrong_setting(reduction: str, label_smoothing: float, softcap: float | None, memory: str | int) -> str:
    """The sentence about a setting that is out of its range; "" where all are inside."""
    if reduction not in REDUCTIONS:
        return f"{reduction!r} is not a valid value for reduction; expected one of {', '.join(map(repr, REDUCTIONS))}"
    if not 0.0 <= label_smoothing <= 1.0:
        return f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}"
    if softcap is not None and not softcap > 0:
        return f"softcap must be a positive number or None. Got: {softcap}"
    if memory not in WORKSPACE and not (type(memory) is int and memory > 0):
        return f'memory must be "auto", "min" or a positive number of MiB. Got: {memory!r}'
    return ""


def wrong_operand(input: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None) -> str:
    """The sentence about operands that do not fit together; "" where they do."""
    if target.dtype != torch.int64:
        remedy = "for class probabilities, compile F.cross_entropy of the logits with the backend"
        return f"target must hold class indices, torch.int64. Got: {target.dtype}; {remedy}"
    if linear_weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != linear_weight.shape[1]:
        shapes = f"input {list(input.shape)}, linear_weight {list(linear_weight.shape)}"
        return f"input must be [..., D] and linear_weight [V, D]. Got: {shapes}"
    if target.shape != input.shape[:-1]:
        expected = f"{list(input.shape[:-1])}, input's without the last dimension"
        return f"target must have the shape {expected}. Got: {list(target.shape)}"
    if bias is not None and bias.shape != linear_weight.shape[:1]:
        return f"bias must have one number a row of linear_weight, {linear_weight.shape[0]}. Got: {list(bias.shape)}"
    return ""


def in_dtype_of_products(h: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the dtype that ``F.linear`` multiplies in: under autocast the region's, else their own."""
    kind = h.device.type
    if torch.is_autocast_enabled(kind) and h.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return h.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    return h, w, bias


def require_labels_in_range(labels: Tensor, counts: Tensor, classes: Any) -> None:
    """Raise LabelOutOfRange for labels that count and are no class of any rank: alike on all ranks."""
    outside = counts & ((labels < 0) | (labels >= classes))
    if labels.is_cpu and not torch.compiler.is_compiling():
        if outside.any():
            wrong = int(labels[outside][0])
            raise LabelOutOfRange(f"label {wrong} is out of range: labels must lie in [0, {int(classes) - 1}]")
    else:
        torch.ops.aten._assert_async.msg(~outside.any(), "a label is out of range")


def head_operands(
    h: Tensor, w: Tensor, cell: Tensor, bias: Tensor | None, weight: Tensor | None, softcap: float | None
) -> Operands:
    """What the ops read. The bias is added before a narrow product is rounded, as ``F.linear`` adds it."""
    wide = statistics_dtype(h.dtype)
    cols, steps = h.new_empty((0, w.shape[0]), dtype=wide), []
    if bias is not None:
        cols = bias.to(wide)[None]
        steps.append("addcol:0")
        if h.dtype in HALF_DTYPES:
            steps.append("round:" + str(h.dtype).removeprefix("torch."))
    if softcap is not None:
        steps += [f"mul:{1 / softcap!r}", "tanh", f"mul:{float(softcap)!r}"]
    u = h.new_empty(0, dtype=wide) if weight is None else weight.to(wide)
    rows = h.new_empty((0, h.shape[0]), dtype=wide)
    return Operands(h, w, cell[:, None], cols, rows, u, " ".join(steps))


READ = ("lse", "lse_low", "picked", "sum", "spread")  # of a head, in the order of `LossStatistics`


def stats_of_loss(loss: Loss) -> str:
    """The statistics that the loss reads, as the ops take them."""
    return "lse,picked,lse_low" + (",sum,spread" if loss.smoothing else "")


def swept_stats(head: Operands, loss: Loss, memory: int) -> LossStatistics:
    """Row statistics in one sweep; their gradient takes another."""
    return loss_statistics(torch.ops.fusedhead.head_stats(*head, stats_of_loss(loss), memory), loss)


def of_all_ranks(
    head: Operands, shard: Tensor, loss: Loss, memory: int, group: dist.ProcessGroup, reduce: str
) -> LossStatistics:
    """The statistics of the whole vocabulary from this rank's columns; ``shard`` is the `span` of these columns."""
    place = (0, 0, group.group_name, reduce, False, shard)
    return loss_statistics(torch.ops.fusedhead.shard_stats(*head, stats_of_loss(loss), memory, *place), loss)


def loss_statistics(results: Any, loss: Loss) -> LossStatistics:
    """The statistics that the loss reads, out of an op's results."""
    lse, low, picked, total, spread = (results[STATS.index(name)] for name in READ)
    return LossStatistics(lse, low, picked, total, spread) if loss.smoothing else LossStatistics(lse, low, picked)


def reduced(stats: LossStatistics, loss: Loss) -> Tensor:
    """The loss of these statistics, in their dtype; differences lose the digits that both sides share first."""
    lse = stats.lse + 0 * stats.lse.detach()  # NaN where a logit is +inf, as in a log_softmax
    rows = ((1 - loss.smoothing) * loss.label_weight) * ((lse - stats.picked[:, 0]) + stats.lse_low)
    if loss.smoothing:
        assert stats.sum is not None
        assert stats.spread is not None
        rounded = lse * loss.total_weight - stats.sum
        lost = (stats.spread - rounded.detach()).nan_to_num(0.0, 0.0, 0.0)
        rows = rows + (loss.smoothing / loss.classes) * (rounded + lost)
    rows = torch.where(loss.counts, rows, 0)
    square = torch.where(loss.counts, loss.z_loss * lse * lse, 0) if loss.z_loss else 0
    if loss.reduction == "none":
        return rows + square
    if loss.reduction == "sum":
        return (rows + square).sum()
    value = rows.sum() / loss.label_weight.sum()
    return value + square.sum() / loss.counts.sum() if isinstance(square, Tensor) else value


def with_gradients(head: Operands, loss: Loss, memory: int, place: tuple[Any, ...] = ()) -> Tensor:
    """A scalar loss, and its gradients in the same sweep: it is linear in the statistics and in the lse squared.

    ``place`` says where this rank's columns are: the first, the number of all, the group, how dh is summed.
    """
    weight_sum, number = loss.label_weight.sum(), loss.counts.sum()
    mean = loss.reduction == "mean"

    def coefficient(x: Any, divisor: Tensor) -> Tensor:
        x = x / divisor if mean else x
        return torch.where(loss.counts, x, 0).to(loss.label_weight.dtype)

    none = loss.label_weight.new_empty(0)
    smooth = coefficient(torch.full_like(loss.label_weight, loss.smoothing / loss.classes), weight_sum)
    label = coefficient((1 - loss.smoothing) * loss.label_weight, weight_sum)
    c_lse = label + smooth * loss.total_weight if loss.smoothing else label
    c_square = coefficient(torch.full_like(label, loss.z_loss), number) if loss.z_loss else none
    needs = [x.requires_grad for x in (head.h, head.w, head.cols)]
    op = torch.ops.fusedhead.shard_loss if place else torch.ops.fusedhead.head_loss
    c, inverse = [c_lse, -label[:, None], -smooth if loss.smoothing else None], 1.0
    if head.h.dtype == torch.float16 and not (place or loss.z_loss or head.transform):
        c, inverse = times_gain(computed, head.h, c, head.u if head.u.numel() else None, loss.classes)
    out = op(
        *head[:6], *(none if x is None else x for x in c), c_square,
        head.transform, stats_of_loss(loss), memory, *needs, False, *place,
    )  # fmt: skip
    lse, low, picked, total, spread = (out[LOSS_OUTPUTS.index(name)].detach() for name in READ)
    # -0.0 passes the upstream gradient to the op, which holds all gradients up to this factor
    tie = out[LOSS_OUTPUTS.index("tie")] * inverse
    return reduced(LossStatistics(lse, low, picked, total, spread), loss) + tie

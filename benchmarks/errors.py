"""How far a result is from the truth: loss, dH and dW in float64, in windows of rows so that big heads fit.

Truth is computed from the very h and W that the contender gets (rounded to their dtype already), so an error is the
contender's alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.data import IGNORED, Batch
from benchmarks.tasks import Task, labels_of

FLOAT32 = torch.finfo(torch.float32).eps
WINDOW_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}  # of one float64 window of logits


class Truth(NamedTuple):
    value: Tensor  # mean loss [] or log-probabilities [N], float64
    dh: Tensor  # [N, D] float64 (float32 on CUDA, to leave the memory to the contenders)
    dw: Tensor  # [V, D] like dh


def truth_of(task: Task, batch: Batch) -> Truth:
    """Float64, by windows of tokens: z = h Wᵀ, nll = lse - z_y, dz = c (p - onehot), dH, dW += dzᵀh."""
    y = labels_of(task, batch)
    valid = y != IGNORED
    picked = y.clamp(min=0)
    if task.per_token:
        coefficient = -batch.upstream.double()  # of each row's nll
    else:
        coefficient = valid.double() / valid.sum()
    n, v = batch.h.shape[0], batch.w.shape[0]
    w = batch.w.double()
    window = max(1, WINDOW_BYTES.get(batch.h.device.type, 1 << 30) // (8 * v))
    nll = torch.empty(n, dtype=torch.float64, device=w.device)
    dh = torch.empty(batch.h.shape, dtype=torch.float64, device=w.device)
    dw = torch.zeros_like(w)
    for start in range(0, n, window):
        rows = slice(start, min(start + window, n))
        h = batch.h[rows].double()
        z = h @ w.t()
        label = picked[rows, None]
        lse = z.logsumexp(-1)
        nll[rows] = lse - z.gather(-1, label).squeeze(-1)
        dz = z.sub_(lse[:, None]).exp_()
        dz.scatter_add_(-1, label, torch.full_like(dz[:, :1], -1.0))
        dz.mul_(coefficient[rows, None])
        dh[rows] = dz @ w
        dw.addmm_(dz.t(), h)
        del z, dz
    value = -nll if task.per_token else (coefficient * nll).sum()
    kept = torch.float32 if w.device.type == "cuda" else torch.float64
    del w
    return Truth(value, dh.to(kept), dw.to(kept))


def relative(result: Tensor, truth: Tensor) -> float:
    """‖result - truth‖ / ‖truth‖ in float64, NaN if anything in the result is."""
    above = torch.zeros((), dtype=torch.float64, device=truth.device)
    below = torch.zeros_like(above)
    for mine, true in zip(result.reshape(-1).split(1 << 25), truth.reshape(-1).split(1 << 25)):
        true = true.double()
        above += (mine.double() - true).square().sum()
        below += true.square().sum()
    return float((above / below).sqrt())


def errors_of(task: Task, results: tuple[Tensor, ...], truth: Truth) -> dict[str, float]:
    """Relative errors by name: ``loss`` (of the log-probabilities where those are asked), ``dh``, ``dw``."""
    expected = {"h": truth.dh, "w": truth.dw}
    errors = {"loss": relative(results[0], truth.value)}
    for operand, result in zip(task.grads, results[1:]):
        errors[f"d{operand}"] = relative(result, expected[operand])
    return errors


def against(errors: dict[str, float], eager: dict[str, float]) -> dict[str, float]:
    """Each error over eager's own error of the same name.

    Errors below FLOAT32 count as that: a float32 result is not nearer to the truth than by luck.
    """
    return {name: max(error, FLOAT32) / max(eager[name], FLOAT32) for name, error in errors.items() if name in eager}

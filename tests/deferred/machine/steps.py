"""Steps: functions from logits to logits, to statistics, and of two logits, with one side of the programs at hand."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.deferred.machine.models import Side
from tests.eager_stack import backend


def cross_entropy(z: Tensor, y: Tensor, **how: Any) -> Tensor:
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1)[: z.numel() // z.shape[-1]], **how)


def entropy(z: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=z).entropy()


@cache
def loss_compiled_by(compiler: str) -> Callable[[Tensor, Tensor], Tensor]:
    by = backend(lambda report: None) if compiler == "pass" else compiler
    return torch.compile(cross_entropy, backend=by)


@cache
def step_with_a_break() -> Callable[[Tensor], Tensor]:
    def step(z: Tensor) -> Tensor:
        z = z / 0.7
        torch._dynamo.graph_break()
        return z - z.logsumexp(-1, keepdim=True)

    return torch.compile(step, backend=backend(lambda report: None))


def pickled(z: Tensor) -> Tensor:
    stored = io.BytesIO()
    torch.save(z, stored)
    stored.seek(0)
    return torch.load(stored) + pickle.loads(pickle.dumps(z))


class Sub(Tensor):
    pass


def hooked(z: Tensor) -> Tensor:
    _ = z.grad_fn  # register_hook on a view whose base was written to since ends the process, also in eager code
    z.register_hook(lambda grad: grad * 0.5)
    return z


def kept(z: Tensor) -> Tensor:
    z.retain_grad()
    return z


# [.., V] to the like
STEPS: dict[str, Callable[[Side, Tensor], Any]] = {
    "flattened": lambda s, z: z.reshape(-1, z.shape[-1]),
    "viewed": lambda s, z: z.view(-1, z.shape[-1]),
    "shifted": lambda s, z: z[:-1],
    "one": lambda s, z: z[0],
    "tokens": lambda s, z: z[..., 1:, :] if z.ndim > 1 else z,
    "masked": lambda s, z: z[(s.tokens if z.ndim == 3 else s.tokens.flatten())[: z.shape[0]] % 2 == 0],
    "transposed": lambda s, z: z.transpose(0, 1) if z.ndim > 2 else z,
    "chunks": lambda s, z: z.chunk(2, 0),
    "split": lambda s, z: z.split(3, 0),
    "temperature": lambda s, z: z / 0.7,
    "scaled": lambda s, z: z * s.model.scale,
    "shifted by class": lambda s, z: z + s.model.shift,
    "masked classes": lambda s, z: z.masked_fill(torch.arange(z.shape[-1]) > 1000, -30.0),
    "float": lambda s, z: z.float(),
    "bfloat16": lambda s, z: z.bfloat16(),
    "clone": lambda s, z: z.clone(),
    "contiguous": lambda s, z: z.contiguous(),
    "detach": lambda s, z: z.detach(),
    "data": lambda s, z: z.data,
    "log_softmax": lambda s, z: z.log_softmax(-1),
    "softmax": lambda s, z: z.softmax(-1),
    "tanh": lambda s, z: z.tanh(),
    "exp": lambda s, z: (z * 0.1).exp(),
    "unsqueezed": lambda s, z: z.unsqueeze(0).squeeze(0),
    "hooked": lambda s, z: hooked(z),
    "its gradient kept": lambda s, z: kept(z),
    "a leaf of it": lambda s, z: z.detach().requires_grad_(),
    "copied": lambda s, z: copy.deepcopy(z),
    "copied, detached": lambda s, z: copy.deepcopy(z.detach()),
    "copied, shallow": lambda s, z: copy.copy(z),
    "pickled": lambda s, z: pickled(z.detach()),
    "a parameter": lambda s, z: nn.Parameter(z.detach().clone()),
    "of a subclass": lambda s, z: z.as_subclass(Sub).as_subclass(Tensor),
    "another class and back": lambda s, z: torch.as_tensor(z.detach().numpy()),
    "through a graph break": lambda s, z: step_with_a_break()(z),
    "written": lambda s, z: z.mul_(0.5),
    "a class written": lambda s, z: z.index_fill_(-1, torch.tensor([3]), -2.0),
    "filled": lambda s, z: z.masked_fill_(torch.arange(z.shape[-1]) == 7, 0.5),
    "a copy written": lambda s, z: z.clone().div_(0.7),
    "the gradient switched": lambda s, z: z.requires_grad_(),
    "the numbers": lambda s, z: (z * 0.3).sin(),
    "rolled": lambda s, z: z.roll(1, 0),
    "summed in order": lambda s, z: z.cumsum(-1) * 0.01,
    "stacked": lambda s, z: torch.stack([z, z * 2])[1],
}  # fmt: skip

# [.., V] to a few numbers
STATISTICS: dict[str, Callable[[Side, Tensor], Any]] = {
    "cross_entropy": lambda s, z: cross_entropy(z, s.labels),
    "sum of losses": lambda s, z: cross_entropy(z, s.labels, reduction="sum", ignore_index=5),
    "losses": lambda s, z: cross_entropy(z, s.labels, reduction="none"),
    "smoothed": lambda s, z: cross_entropy(z, s.labels, label_smoothing=0.1),
    "weighted": lambda s, z: cross_entropy(z, s.labels, weight=torch.linspace(0.5, 1.5, z.shape[-1], dtype=z.dtype)),
    "a label too large": lambda s, z: cross_entropy(z, s.labels + 2000),
    "log-probabilities": lambda s, z: z.log_softmax(-1).reshape(-1, z.shape[-1])[:5].gather(-1, s.labels[0, :5, None]),
    "nll_loss": lambda s, z: F.nll_loss(z.reshape(-1, z.shape[-1]).log_softmax(-1)[:4], s.labels[0, :4]),
    "logsumexp": lambda s, z: z.logsumexp(-1),
    "z-loss": lambda s, z: z.logsumexp(-1).pow(2).mean(),
    "entropy": lambda s, z: entropy(z),
    "argmax": lambda s, z: z.argmax(-1),
    "largest": lambda s, z: z.max(-1).values,
    "topk": lambda s, z: z.topk(3, -1).values,
    "mean": lambda s, z: z.mean(),
    "squares": lambda s, z: z.pow(2).mean(-1),
    "variance": lambda s, z: z.var(-1),
    "an item": lambda s, z: z.reshape(-1)[5].item(),
    "a list": lambda s, z: z.reshape(-1, z.shape[-1])[0].tolist(),
    "compiled loss": lambda s, z: loss_compiled_by("pass")(z, s.labels),
    "loss compiled by another": lambda s, z: loss_compiled_by("aot_eager")(z, s.labels),
    "gradient of a function": lambda s, z: torch.func.grad(lambda t: t.logsumexp(-1).mean())(z).pow(2).sum(),
    "vmap": lambda s, z: torch.func.vmap(lambda t: z.logsumexp(-1) * t)(torch.ones(2)),
    "vmap over it": lambda s, z: torch.func.vmap(lambda row: row.logsumexp(-1))(z),
    "its gradient": lambda s, z: torch.autograd.grad(z.logsumexp(-1).mean(), z, retain_graph=True)[0].sum(-1),
    "what it is": lambda s, z: str((z.is_contiguous(), z.stride(), z.storage_offset(), z._version)),
}  # fmt: skip

# two of one shape
MEETINGS: dict[str, Callable[[Side, Tensor, Tensor], Any]] = {
    "KL": lambda s, z, w: F.kl_div(z.log_softmax(-1), w.log_softmax(-1), log_target=True, reduction="batchmean"),
    "KL to probabilities": lambda s, z, w: F.kl_div(z.log_softmax(-1), w.softmax(-1), reduction="sum"),
    "ratio": lambda s, z, w: (z.log_softmax(-1)[..., 3] - w.log_softmax(-1)[..., 3]).exp().mean(),
    "difference": lambda s, z, w: z - w,
    "distance": lambda s, z, w: F.mse_loss(z, w),
    "mixture": lambda s, z, w: torch.logaddexp(z.log_softmax(-1), w.log_softmax(-1)).logsumexp(-1),
    "together": lambda s, z, w: torch.cat([z, w]),
    "copied into": lambda s, z, w: z.copy_(w),
    "losses together": lambda s, z, w: cross_entropy(z, s.labels) + cross_entropy(w, s.labels),
}

"""A token program of two heads (a divergence, and the best classes of one), its inputs, and the same in eager code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedhead.lowering.token_ops  # noqa: F401  registers the ops

N, V, D = 37, 50, 8

DIVERGENCE = """\
v0 = head(r0, t1, t2, r3, '', float32)
v1 = log_softmax.int(v0, 1, float32)
v2 = head(r4, t5, t6, r7, 'mul:0.5', float32)
v3 = softmax.int(v2, 1, float32)
v4 = xlogy.Tensor(v3, v3)
v5 = mul.Tensor(v3, v1)
v6 = sub.Tensor(v4, v5)
v7 = sum.dim_IntList(v6, [1])
v8 = topk.default(v0, 3, 1)
v9 = item(v8, 1)
return v7, v9""".replace("\n", "; ")


def inputs(n: int = N, v: int = V, d: int = D, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    def head() -> list[Tensor]:
        h, w = torch.randn(n, d, dtype=dtype), torch.randn(v, d, dtype=dtype)
        return [h.requires_grad_(), w.requires_grad_(), torch.empty(0, v), torch.empty(n, 0)]

    return head() + head()


def divergence(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    z, t = F.linear(*tensors[:2]), F.linear(*tensors[4:6])
    p = (t.float() * 0.5).softmax(1)
    return (torch.xlogy(p, p) - p * z.float().log_softmax(1)).sum(1), z.topk(3, 1)[1]

"""The gradient that a head in shards gives its hidden states in bfloat16; what each rank does in the test of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

from tests.parallel.arrangements import tp_mesh
from tests.parallel.models import Setting, compiled

N, D, V = 256, 32, 203  # an uneven V; tokens in equal shards
BF16 = torch.bfloat16


class Alone(nn.Module):
    """A head and its loss, of hidden states that are given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(D, V, bias=False, dtype=torch.float64)
        self.loss: Callable[..., Tensor] = F.cross_entropy

    def forward(self, h: Any, y: Tensor) -> Tensor:
        return self.loss(self.head(h), y)


def mixed(z: Tensor, y: Tensor) -> Tensor:
    """A loss whose gradients are computed in the backward: the entropy is no linear statistic."""
    log_p = z.float().log_softmax(-1)
    return F.cross_entropy(z.float(), y) - 0.1 * (log_p.exp() * log_p).sum(-1).mean()


def given() -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(1)
    return torch.randn(N, D, generator=make, dtype=torch.float64), torch.randint(V, (N,), generator=make)


def gradient(model: Any, h: Any, y: Tensor, around: Any) -> Tensor:
    with around:
        model(h, y).backward()
    result = h.grad
    return (result.full_tensor() if isinstance(result, DTensor) else result).double()


def of_one_process(dtype: torch.dtype, loss: Callable[..., Tensor] | None = None, fused: bool = False) -> Tensor:
    from contextlib import nullcontext

    model, (h, y) = Alone().to(BF16).to(dtype), given()
    model.loss = loss or model.loss
    h = h.to(BF16).to(dtype).requires_grad_()
    return gradient(compiled(model, Setting(), []) if fused else model, h, y, nullcontext())


def of_ranks(form: str, loss: Callable[..., Tensor] | None, records: list[Any]) -> Tensor:
    from contextlib import nullcontext

    mesh, model, (h, y) = tp_mesh(Setting()), Alone().to(BF16), given()
    model.loss = loss or model.loss
    local, scattered = form != "loss_parallel", form == "tokens in shards"
    style = ColwiseParallel(
        input_layouts=Shard(0) if scattered else Replicate(),
        output_layouts=Replicate() if local else Shard(-1),
        use_local_output=local,
    )
    parallelize_module(model, mesh, {"head": style})
    placed = distribute_tensor(h.to(BF16), mesh, [Shard(0)]) if scattered else h.to(BF16)
    around = nullcontext() if local else loss_parallel()
    return gradient(compiled(model, Setting(), records), placed.requires_grad_(), y, around)


FORMS = ("loss_parallel", "gathered", "tokens in shards")


def outcomes() -> dict[str, Any]:
    """h.grad by the name of a form, and which heads were fused."""
    results: dict[str, Any] = {}
    for form in FORMS:
        records: list[Any] = []
        results[form] = of_ranks(form, None, records)
        if form != "loss_parallel":
            results[f"{form}, entropy"] = of_ranks(form, mixed, records)
        dist.barrier()
        assert all(head.fused for head in records), [str(head) for head in records]
        assert records
    return results

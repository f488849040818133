"""Programs of one rank that arrange a head as DistributedDataParallel and FSDP do (run by `tests.functional.ranks`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fusedhead.report.report import Report
from tests.eager_stack import backend

V = 2048


class Model(nn.Module):
    """More than one bucket of gradients, so that DDP cuts the graph."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, V, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        logits = self.head(h)
        return logits, F.cross_entropy(logits.view(-1, V), y.view(-1))


def replicated() -> tuple[int, int]:
    """(graphs, heads fused) of a model under DDP, whose loss and gradient are compared with eager code's."""
    torch.manual_seed(0)
    reports: list[Report] = []
    model, x = Model(), torch.randint(0, V, (2, 8))
    expected = model(x, x)[1]
    expected.backward()
    assert model.head.weight.grad is not None
    gradient = model.head.weight.grad.clone()
    model.zero_grad()
    parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    loss = torch.compile(parallel, backend=backend(reports.append, aot_eager))(x, x)[1]
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.head.weight.grad, gradient, atol=1e-6, rtol=1e-5)
    return len(reports), sum(head.fused for report in reports for head in report.heads)


class Head(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.project = nn.Linear(width, V, bias=False)

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.project(torch.tanh(h))
        return logits if y is None else F.cross_entropy(logits, y)


def freed() -> list[Any]:
    """Each head of a module that FSDP frees after its forward: (fused, reason, why logits were built at once).

    The loss is taken outside of the module, then in it; losses of two steps are compared with eager code's.
    """
    reports: list[Report] = []
    losses: dict[tuple[str, bool], Tensor] = {}
    backends: dict[str, Any] = {"eager": "eager", "fusedhead": backend(reports.append, aot_eager)}
    h, y = torch.randn(8, 64), torch.randint(0, V, (8,))
    for name, compiler in backends.items():
        for within in (False, True):
            torch.manual_seed(0)
            model: Any = Head()
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
            model.compile(backend=compiler)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            for _ in range(2):
                loss = model(h, y) if within else F.cross_entropy(model(h), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses[name, within] = loss
    for within in (False, True):
        torch.testing.assert_close(losses["fusedhead", within], losses["eager", within])
    heads = [head for report in reports for head in report.heads]
    return [(head.fused, str(head.reason), [why for why, _ in head.run.at_once.items()]) for head in heads]

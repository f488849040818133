"""Deferred logits on a GPU: memory that CUDA graphs use again, and divergences that are computed token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # Inductor's own
V, D, B, T = 4096, 128, 4, 64


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.cuda()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


def tokens(seed: int) -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed)).cuda()


def compiled(model: nn.Module, **more: Any) -> Any:
    return torch.compile(model, backend="fusedhead", options={"fusedhead.min_logits": 0, **more})


def cross_entropy(z: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, V), x.view(-1))


def test_logits_of_a_run_under_cuda_graphs_survive_the_next_run() -> None:
    model = Model(0)
    run = compiled(model, **{"triton.cudagraphs": True})
    for _ in range(3):  # warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            first = run(tokens(1))
            torch.compiler.cudagraph_mark_step_begin()
            second = run(tokens(2))
        for z, seed in ((first, 1), (second, 2)):
            expected = cross_entropy(model(tokens(seed)), tokens(seed))
            torch.testing.assert_close(cross_entropy(z, tokens(seed)), expected, rtol=1e-3, atol=1e-3)


def test_a_loss_outside_trains_under_cuda_graphs() -> None:
    model = Model(0)
    run = compiled(model, **{"triton.cudagraphs": True})
    for seed in range(4):
        x = tokens(seed)
        wanted = torch.autograd.grad(cross_entropy(model(x), x), list(model.parameters()))
        torch.compiler.cudagraph_mark_step_begin()
        actual = torch.autograd.grad(cross_entropy(run(x), x), list(model.parameters()))
        torch.testing.assert_close(actual, wanted, rtol=1e-2, atol=1e-4)


def test_a_divergence_between_two_models_builds_no_logits() -> None:
    student, teacher, x = Model(0), Model(1), tokens(1)
    runs = compiled(student), compiled(teacher)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(s, -1), F.log_softmax(t.detach(), -1), log_target=True, reduction="batchmean")

    wanted = torch.autograd.grad(loss(student(x), teacher(x)), list(student.parameters()))
    for _ in range(2):
        s, t = runs[0](x), runs[1](x)
        value = loss(s, t)
        actual = torch.autograd.grad(value, list(student.parameters()))
        assert s._plain is None
        assert t._plain is None
    torch.testing.assert_close(value, loss(student(x), teacher(x)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(actual, wanted, rtol=1e-2, atol=1e-5)

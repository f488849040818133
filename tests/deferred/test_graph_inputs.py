"""Deferred logits handed to another compiled function: fused by fusedhead, right under any compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.report.report import Report
from tests.deferred.heads import B, Model, T, V, deferring, gradients, is_deferred, tokens
from tests.eager_stack import backend

# torch's own, for every result of a differentiable computation that enters a compiled function
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

Y = torch.arange(B * T) * 7


def loss(z: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, z.size(-1)).float(), Y)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_loss_compiled_on_its_own_sees_hidden_states_and_weight(fullgraph: bool) -> None:
    model, x, report = Model(), tokens(), Report()
    wanted = gradients(model, loss(model(x)))
    z = deferring(model)(x)
    compiled = torch.compile(loss, backend=backend(report.extend), fullgraph=fullgraph)
    value = compiled(z)
    torch.testing.assert_close(gradients(model, value), wanted, rtol=1e-4, atol=1e-6)
    (head,) = report.heads
    assert (head.fused, head.logits) == (True, "never built")
    assert "head_loss" in report.after
    assert is_deferred(z)


def test_the_next_batch_uses_the_same_graph() -> None:
    model, report = Model(), Report()
    run, compiled = deferring(model), torch.compile(loss, backend=backend(report.extend))
    for _ in range(3):
        x = tokens()
        torch.testing.assert_close(compiled(run(x)), loss(model(x)))
    assert report.graphs == 1


def test_steps_taken_outside_are_seen_inside() -> None:
    model, x, report = Model(), tokens(), Report()
    wanted = gradients(model, loss(model(x) / 0.7))
    value = torch.compile(loss, backend=backend(report.extend), fullgraph=True)(deferring(model)(x) / 0.7)
    torch.testing.assert_close(gradients(model, value), wanted, rtol=1e-4, atol=1e-6)
    assert report.heads[0].fused


def test_logits_that_exist_by_then_enter_as_a_tensor() -> None:
    model, x, report = Model(), tokens(), Report()
    wanted = gradients(model, loss(model(x)))
    z = deferring(model)(x)
    z.sin()
    value = torch.compile(loss, backend=backend(report.extend), fullgraph=True)(z)
    torch.testing.assert_close(gradients(model, value), wanted, rtol=1e-4, atol=1e-6)
    assert report.heads == []


def test_logits_that_were_written_to_enter_as_they_are() -> None:
    model, x = Model(), tokens()
    real, z = model(x).detach(), deferring(model)(x).detach()
    compiled = torch.compile(loss, backend=backend(Report().extend))
    compiled(deferring(model)(x).detach())
    for logits in (real, z):
        logits[..., 3] = 50.0
    torch.testing.assert_close(compiled(z), loss(real))


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("other", ["eager", "aot_eager", "inductor"])
def test_compilers_that_know_nothing_of_it_are_right_too(other: str, fullgraph: bool) -> None:
    model, x = Model(), tokens()
    wanted = gradients(model, loss(model(x)))
    run, compiled = deferring(model), torch.compile(loss, backend=other, fullgraph=fullgraph)
    for _ in range(2):
        value = compiled(run(x))
        torch.testing.assert_close(gradients(model, value), wanted, rtol=1e-4, atol=1e-6)


def test_one_call_from_tokens_to_loss_through_inductor() -> None:
    """Model and loss compiled by the whole backend, one after the other."""
    model, x = Model(), tokens()
    wanted = gradients(model, loss(model(x)))
    settings: dict[str, Any] = {"backend": "fusedhead", "options": {"fusedhead.logits": "deferred"}}
    run, compiled = torch.compile(model, **settings), torch.compile(loss, **settings)
    for _ in range(2):
        torch.testing.assert_close(gradients(model, compiled(run(x))), wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradients(model, loss(run(x))), wanted, rtol=1e-4, atol=1e-6)


def test_numbers_of_tokens_may_vary_at_the_border() -> None:
    model, report = Model(), Report()
    run, compiled = (
        deferring(model, dynamic=True),
        torch.compile(
            lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)), backend=backend(report.extend), dynamic=True
        ),
    )
    for rows, length in ((2, 5), (3, 7), (4, 6)):
        x = tokens(rows, length)
        torch.testing.assert_close(compiled(run(x), x), F.cross_entropy(model(x).view(-1, V), x.view(-1)))
    assert all(head.fused and head.computes.startswith("cross_entropy") for head in report.heads)
    assert len(report.heads) == report.graphs
    assert report.graphs <= 2


def test_a_stale_weight_is_noticed_at_the_border() -> None:
    model = Model()
    z = deferring(model)(tokens())
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"lm_head.weight"):
        torch.compile(loss, backend=backend(Report().extend))(z)


def test_a_cast_that_changes_nothing_at_the_border() -> None:
    """`float()` of float32 logits is the same object to Dynamo: GPT-2, whose warning ends the graph before its loss."""
    model, x, report = Model(), tokens(), Report()
    compiled = torch.compile(lambda z: loss(z.float()), backend=backend(report.extend))
    wanted = gradients(model, loss(model(x)))
    torch.testing.assert_close(gradients(model, compiled(deferring(model)(x))), wanted, rtol=1e-4, atol=1e-6)
    assert [head.fused for head in report.heads] == [True]

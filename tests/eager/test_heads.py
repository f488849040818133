"""Heads that nobody compiles: eager projections hand out deferred logits, and what a program sees is as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedhead
from fusedhead.report.summary import Summary
from tests.eager.models import ORIGINAL, D, Model, V, batch, same, step
from tests.eager_stack import backend


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_loss_of_an_eager_head_has_the_numbers_of_eager_code(bias: bool, summary: Summary) -> None:
    model, (x, y) = Model(bias), batch()
    exact, plain = step(copy.deepcopy(model).double(), x, y), step(model, x, y)
    small = step(copy.deepcopy(model).double(), x[:3], y[:3]), step(model, x[:3], y[:3])
    assert fusedhead.defer(model) is model
    same(step(model, x, y), plain, exact)
    same(step(model, x[:3], y[:3]), small[1], small[0])
    (head,) = summary.heads()
    assert (head.fused, head.module, head.logits) == (True, "lm_head", "deferred")
    assert "models.py" in head.where
    assert (head.run.answered.value, head.run.built.total) == (2, 0)
    assert "never built" in str(head)


def test_under_autocast_it_has_the_numbers_of_a_compiled_model() -> None:
    model, (x, y) = Model(True), batch()
    reference = torch.compile(copy.deepcopy(model), backend=backend(lambda report: None))
    fusedhead.defer(model)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, compiled in zip(step(model, x, y), step(reference, x, y), strict=True):
            assert torch.equal(ours, compiled)


def test_a_model_that_is_used_through_a_method_is_fused(summary: Summary) -> None:
    fusedhead.enable()
    model, (x, y) = Model(), batch()
    model.calculate_loss(x, y).backward()
    F.cross_entropy(model.forward(x).flatten(0, 1), y.flatten()).backward()
    (head,) = summary.heads()
    assert (head.run.answered.value, head.module) == (2, "lm_head")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_blocks_and_a_loss_that_are_compiled_around_an_eager_head(summary: Summary) -> None:
    model, (x, y) = Model(), batch()
    plain, exact = step(model, x, y), step(copy.deepcopy(model).double(), x, y)
    fusedhead.defer(model.lm_head)
    model.mix.compile(backend=backend(lambda report: None))
    reports: list[Any] = []
    loss = torch.compile(lambda z, y: F.cross_entropy(z.float(), y), backend=backend(reports.append))
    same(step(model, x, y, loss), plain, exact)
    assert [head.fused for report in reports for head in report.heads] == [True]
    (head,) = summary.heads()
    assert (head.run.passed.value, head.run.built.total) == (1, 0)


def test_a_layer_that_is_read_by_an_activation_is_no_head_and_stops(summary: Summary) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, V), nn.Linear(V, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)))

    model, x = Mlp(), torch.randn(64, D)
    expected = model(x)
    fusedhead.enable()
    assert all(torch.equal(model(x), expected) for _ in range(5))
    (head,) = summary.heads()
    assert (head.module, head.run.built.total, head.run.at_once.total) == ("up", 2, 3)
    assert "no longer deferred, since what reads them is no loss: linear at test_heads.py" in str(head)


def test_a_look_at_the_first_logits_does_not_stop_a_head(summary: Summary) -> None:
    model, (x, y) = Model(), batch()
    fusedhead.defer(model)
    model(x).tolist()
    for _ in range(3):
        step(model, x, y)
    (head,) = summary.heads()
    assert (head.run.built.total, head.run.answered.value, head.run.at_once.total) == (1, 3, 0)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model: nn.Module) -> nn.Module:
    other = Model()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("again", [copied, pickled, saved, loaded])
def test_a_model_is_copied_and_saved_as_before(again: Callable[[nn.Module], nn.Module]) -> None:
    model, (x, y) = Model(), batch()
    before = set(vars(model.lm_head))
    fusedhead.defer(model)
    step(model, x, y)
    assert set(vars(model.lm_head)) == before
    other = again(model)
    assert type(other(x)) is Tensor  # a copy is nobody's yet
    assert torch.equal(other(x), model(x))


def test_disable_puts_torchs_forward_back() -> None:
    fusedhead.enable()
    assert nn.Linear.forward is not ORIGINAL
    fusedhead.disable()
    assert nn.Linear.forward is ORIGINAL
    assert type(Model()(batch()[0])) is Tensor


def test_what_cannot_be_deferred_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"expects a torch.nn.Module, got int"):
        fusedhead.defer(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Linear holds no torch.nn.Linear that looks like a head"):
        fusedhead.defer(nn.Linear(4, 4))


def test_a_forward_that_is_not_torchs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(self: nn.Linear, input: Tensor) -> Tensor:
        return ORIGINAL(self, input) * 2

    monkeypatch.setattr(nn.Linear, "forward", theirs)
    with pytest.raises(RuntimeError, match="not torch's own"):
        fusedhead.defer(nn.Linear(D, V))
    fusedhead.enable()
    assert any("not torch's own" in change.state for change in fusedhead.changes())
    assert nn.Linear.forward is theirs

"""--compile-eager: which module is compiled, when, and that nothing breaks by it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedhead.report import observers
from fusedhead.report.head_record import HeadRecord
from fusedhead.report.report import Report
from fusedhead.run import compile_eager


class Head(nn.Module):
    def __init__(self, vocab: int = 64) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, vocab, bias=False)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.body(h))), y)


class Outer(nn.Module):
    """Like a LightningModule: the training loop calls a method of it, not the module."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Head()

    def training_step(self, h: Tensor, y: Tensor) -> Tensor:
        return self.model(h, y)


@pytest.fixture
def heads() -> Iterator[list[HeadRecord]]:
    """Every head that is looked at while models are compiled behind the program's back."""
    seen: list[HeadRecord] = []

    def add(report: Report) -> None:
        seen.extend(report.heads)

    remove, stop = observers.add(add), compile_eager.watch_optimizers()
    yield seen
    stop()
    remove()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 16), torch.randint(0, 64, (8,))


def compiled(module: nn.Module) -> bool:
    call = module._compiled_call_impl
    return call is not None and not isinstance(call, compile_eager.Attention)


def test_the_model_of_an_optimizer_is_compiled_at_its_first_training_call(heads: list[HeadRecord]) -> None:
    model = Head()
    h, y = batch()
    expected = torch.autograd.grad(model(h, y), model.head.weight)[0]
    assert heads == []
    torch.optim.SGD(model.parameters(), 0.1)
    model(h, y).backward()
    assert [head.fused for head in heads] == [True]
    torch.testing.assert_close(model.head.weight.grad, expected)


def test_the_outermost_module_that_is_called_is_the_one(heads: list[HeadRecord]) -> None:
    outer = Outer()
    torch.optim.AdamW(outer.parameters())
    outer.training_step(*batch()).backward()
    assert (compiled(outer), compiled(outer.model), compiled(outer.model.head)) == (False, True, False)
    assert [head.fused for head in heads] == [True]


def test_calls_without_gradients_stay_eager(heads: list[HeadRecord]) -> None:
    model = Head()
    torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model(*batch())
    assert not compiled(model)
    model(*batch())
    with torch.no_grad():
        model(*batch())
    assert len(heads) == 1


def test_a_trained_adapter_in_a_frozen_model_finds_the_model(heads: list[HeadRecord]) -> None:
    model = Head()
    model.head.weight.requires_grad_(False)
    torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    model(*batch()).backward()
    assert compiled(model)
    assert [head.fused for head in heads] == [True]
    assert model.head.weight.grad is None


def test_what_the_program_compiles_itself_is_left_to_it(heads: list[HeadRecord]) -> None:
    before, in_place, later = Head(), Head(), Head()
    wrapped = torch.compile(before, backend="eager")
    torch.optim.SGD(wrapped.parameters(), 0.1)
    in_place.compile(backend="eager")
    torch.optim.SGD(in_place.parameters(), 0.1)
    torch.optim.SGD(later.parameters(), 0.1)
    for model in (wrapped, in_place, torch.compile(later, backend="eager")):
        model(*batch()).backward()
    assert heads == []


def test_a_model_that_cannot_be_compiled_runs_as_before(
    heads: list[HeadRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    model = Head()
    torch.optim.SGD(model.parameters(), 0.1)
    h, y = batch()
    loss = model(h, y)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(model.head(torch.tanh(model.body(h))), y))


def test_copies_and_pickles_are_plain_models(heads: list[HeadRecord]) -> None:
    model = Head()
    torch.optim.SGD(model.parameters(), 0.1)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied._compiled_call_impl is None
    model(*batch())
    assert copy.deepcopy(model)._compiled_call_impl is None


def test_hooks_run_as_often_as_before(heads: list[HeadRecord]) -> None:
    model, calls = Head(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    torch.optim.SGD(model.parameters(), 0.1)
    model(*batch())
    model(*batch())
    assert len(calls) == 2


def test_stopping_leaves_torch_as_it_was() -> None:
    result, suppressed = torch.optim.Optimizer.__init__, torch._dynamo.config.suppress_errors
    stop = compile_eager.watch_optimizers()
    assert torch.optim.Optimizer.__init__ is not result
    stop()
    assert torch.optim.Optimizer.__init__ is result
    assert torch._dynamo.config.suppress_errors == suppressed

"""enable and disable: what would go to Inductor goes through fusedhead, and back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedhead
from fusedhead.report import observers
from fusedhead.report.report import Report


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    yield
    fusedhead.disable()


@pytest.fixture
def reports() -> Iterator[list[Report]]:
    heard: list[Report] = []
    remove = observers.add(heard.append)
    yield heard
    remove()


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.T, y)


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    h, w = torch.randn(8, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    return h, w, torch.randint(0, 64, (8,))


WAYS: dict[str, Callable[[Any], Any]] = {
    "default": lambda f: torch.compile(f),
    "named": lambda f: torch.compile(f, backend="inductor"),
    "with a mode": lambda f: torch.compile(f, mode="max-autotune-no-cudagraphs"),
    "with options": lambda f: torch.compile(f, options={"max_autotune": False}),
    "fullgraph": lambda f: torch.compile(f, backend="inductor", fullgraph=True),
    "decorator": lambda f: torch.compile(fullgraph=True)(f),
    "dynamo by name": lambda f: torch._dynamo.optimize("inductor")(f),
    "fusedhead itself": lambda f: torch.compile(f, backend="fusedhead"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_inductor_goes_through_the_pass_once(way: str, reports: list[Report]) -> None:
    fusedhead.enable()
    h, w, y = arguments()
    WAYS[way](loss)(h, w, y).backward()
    assert [head.fused for report in reports for head in report.heads] == [True]
    torch.testing.assert_close(w.grad, torch.autograd.grad(loss(h, w, y), w)[0])


def test_a_module_compiled_in_place_goes_through_the_pass(reports: list[Report]) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 64)

        def forward(self, h: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(h), y)

    fusedhead.enable()
    h, _, y = arguments()
    model = Head()
    model.compile(backend="inductor")
    model(h, y).backward()
    assert [head.fused for report in reports for head in report.heads] == [True]


def test_what_was_decorated_before_but_not_yet_run_is_reached(reports: list[Report]) -> None:
    compiled = torch.compile(loss)
    fusedhead.enable()
    compiled(*arguments())
    assert len(reports) == 1


def test_other_backends_are_left_alone(reports: list[Report]) -> None:
    fusedhead.enable()
    torch.compile(loss, backend="eager")(*arguments())
    torch.compile(loss, backend="aot_eager")(*arguments())
    assert reports == []


def test_disable_restores_everything_enable_touched() -> None:
    cls = torch._TorchCompileInductorWrapper
    finders, call, logs = list(sys.meta_path), cls.__call__, set(torch._dynamo.config.ignore_logger_methods)
    fusedhead.enable(memory="min")
    assert cls.__call__ is not call
    fusedhead.disable()
    assert (cls.__call__, list(sys.meta_path)) == (call, finders)
    assert set(torch._dynamo.config.ignore_logger_methods) == logs
    assert fusedhead.changes() == []


def test_after_disable_inductor_is_inductor(reports: list[Report]) -> None:
    fusedhead.enable()
    fusedhead.disable()
    torch.compile(loss)(*arguments())
    assert reports == []


def test_enabling_twice_is_enabling_once(reports: list[Report]) -> None:
    fusedhead.enable()
    first = [str(change) for change in fusedhead.changes()]
    fusedhead.enable()
    assert [str(change) for change in fusedhead.changes()] == first
    torch.compile(loss)(*arguments())
    assert len(reports) == 1
    fusedhead.disable()
    fusedhead.disable()
    assert fusedhead.changes() == []


def test_changes_say_where_why_and_whether() -> None:
    fusedhead.enable()
    states = {change.where: change.state for change in fusedhead.changes()}
    assert states["torch._TorchCompileInductorWrapper.__call__"] == "made"
    assert all(change.why for change in fusedhead.changes())
    if "accelerate" not in sys.modules:
        waiting = "waiting for the import of accelerate.utils.dataclasses"
        assert states["accelerate.utils.dataclasses.DynamoBackend._missing_"] == waiting


def test_options_become_defaults_and_a_compilation_wins_over_them(capsys: pytest.CaptureFixture[str]) -> None:
    fusedhead.enable(debug=True)
    torch.compile(loss)(*arguments())
    assert "1 head fused" in capsys.readouterr().out
    torch.compiler.reset()
    torch.compile(loss, backend="fusedhead", options={"fusedhead.debug": False})(*arguments())
    assert capsys.readouterr().out == ""
    fusedhead.enable()
    torch.compiler.reset()
    torch.compile(loss)(*arguments())
    assert capsys.readouterr().out == ""


def test_a_bad_option_raises_and_changes_nothing() -> None:
    call = torch._TorchCompileInductorWrapper.__call__
    with pytest.raises(ValueError, match="unknown option 'memori'"):
        fusedhead.enable(memori=3)
    with pytest.raises(ValueError, match="memory='huge' is not valid"):
        fusedhead.enable(memory="huge")
    assert torch._TorchCompileInductorWrapper.__call__ is call


def test_somebody_elses_later_patch_survives_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = torch._TorchCompileInductorWrapper
    call = cls.__call__
    fusedhead.enable()
    ours = cls.__call__

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    cls.__call__ = theirs
    try:
        fusedhead.disable()
        assert cls.__call__ is theirs
        torch.compile(loss)(*arguments()).backward()  # through theirs and what is left of ours
    finally:
        cls.__call__ = call


def test_threads_may_enable_and_disable_at_once() -> None:
    call = torch._TorchCompileInductorWrapper.__call__

    def toggle() -> None:
        for _ in range(50):
            fusedhead.enable()
            fusedhead.disable()

    threads = [threading.Thread(target=toggle) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch._TorchCompileInductorWrapper.__call__ is call


def test_an_observer_that_raises_does_not_break_a_compilation(caplog: pytest.LogCaptureFixture) -> None:
    def broken(report: Report) -> None:
        raise RuntimeError("broken observer")

    remove = observers.add(broken)
    try:
        torch.compile(loss, backend="fusedhead")(*arguments())
    finally:
        remove()
    assert "broken observer" in caplog.text

"""Numbers for loggers: what is counted, that a callback logs when one changed, and that no framework is imported."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fusedhead.integrations import Watch, add_to_tensorboard
from fusedhead.report import observers
from fusedhead.report.report import Report
from tests.eager_stack import backend
from tests.report.heads import FUSED, LEFT, head


@pytest.fixture
def watch() -> Iterator[Watch]:
    result = Watch()
    yield result
    result.stop()


def compiled() -> Report:
    """What the backend tells of a graph with a fused head and one that was left."""
    report = Report(graphs=1, heads=[head(), head(LEFT)])
    observers.notify(report)
    return report


def test_the_numbers_are_those_of_the_report(watch: Watch) -> None:
    report = compiled()
    report.heads[0].run.answered.add()
    result = watch.metrics()
    assert result == {
        "fusedhead/heads_fused": 1,
        "fusedhead/heads_left": 1,
        "fusedhead/bytes_saved": FUSED.bytes_saved,
        "fusedhead/logits_answered": 1,
        "fusedhead/logits_built": 0,
    }
    written = []
    add_to_tensorboard(SimpleNamespace(add_scalar=lambda *inputs: written.append(inputs)), result, 7)
    assert ("fusedhead/heads_left", 1.0, 7) in written


def test_news_are_told_once_and_again_when_logits_are_built(watch: Watch) -> None:
    assert watch.news() == {}
    report = compiled()
    assert watch.news()["fusedhead/heads_fused"] == 1
    report.heads[0].run.answered.add()
    assert watch.news() == {}
    report.heads[0].run.built.add("svd")
    assert watch.news()["fusedhead/logits_built"] == 1


def test_a_watch_hears_of_a_compilation_and_asks_for_no_texts(watch: Watch) -> None:
    h, w, y = torch.randn(8, 16), torch.randn(64, 16), torch.randint(0, 64, (8,))
    torch.compile(lambda h, w, y: F.cross_entropy(h @ w.T, y), backend=backend(observers.notify))(h, w, y)
    assert watch.metrics()["fusedhead/heads_fused"] == 1
    assert not [reader for reader in observers.readers if getattr(reader, "__self__", None) is watch]


def test_a_watch_that_was_stopped_can_start_again_and_its_copy_begins_anew(watch: Watch) -> None:
    compiled()
    watch.stop()
    watch.stop()
    compiled()
    assert len(watch.summary.reports) == 1
    watch.start()
    watch.start()
    compiled()
    assert len(watch.summary.reports) == 2
    for copied_by in (copy.deepcopy, lambda result: pickle.loads(pickle.dumps(result))):
        copied = copied_by(watch)
        assert copied.metrics()["fusedhead/heads_fused"] == 0
        compiled()
        assert copied.metrics()["fusedhead/heads_fused"] == 1
        copied.stop()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """A stand-in for a framework's module, with a class that callbacks inherit from."""

    def make(name: str, base: str) -> None:
        result = types.ModuleType(name)
        setattr(result, base, type(base, (), {}))
        monkeypatch.setitem(sys.modules, name, result)

    yield make
    for name in ("transformers", "lightning"):
        sys.modules.pop(f"fusedhead.integrations.{name}", None)


def test_transformers_trainer_logs_after_the_step_that_compiled(module) -> None:
    module("transformers", "TrainerCallback")
    logged: list[dict[str, float]] = []
    callbacks = importlib.import_module("fusedhead.integrations.transformers")
    callback = callbacks.FusedHeadCallback(SimpleNamespace(log=logged.append))
    state, control = SimpleNamespace(is_world_process_zero=True), SimpleNamespace(should_log=True)
    callback.on_step_end(None, state, control)
    compiled()
    for _ in range(3):
        callback.on_step_end(None, state, control)
    callback.on_train_end(None, state, None)
    assert [logs["fusedhead/heads_fused"] for logs in logged] == [1]
    alone = callbacks.FusedHeadCallback()
    compiled()
    logs = {"loss": 1.0}
    alone.on_log(None, state, None, logs=logs)
    alone.on_train_end(None, state, None)
    assert logs["fusedhead/heads_left"] == 1


def test_lightning_hands_the_numbers_to_every_logger_of_the_first_rank(module, monkeypatch: pytest.MonkeyPatch) -> None:
    module("pytorch_lightning", "Callback")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    written: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: written.append((metrics, step)))
    callback = importlib.import_module("fusedhead.integrations.lightning").FusedHeadCallback()
    compiled()
    for first in (False, True, True):
        trainer = SimpleNamespace(is_global_zero=first, loggers=[logger, logger], global_step=3)
        callback.on_train_batch_end(trainer, None, None, None, 0)
    callback.on_train_end(trainer, None)
    assert [(metrics["fusedhead/heads_fused"], step) for metrics, step in written] == [(1, 3), (1, 3)]


def test_no_framework_is_imported_with_the_numbers() -> None:
    for name in ("wandb", "mlflow", "tensorboard", "transformers", "lightning", "pytorch_lightning"):
        assert name not in sys.modules

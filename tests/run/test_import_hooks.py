"""Edits of packages that are not imported yet, made when they are: stand-ins for accelerate, transformers."""

from __future__ import annotations

import copy
import enum
import importlib
import json
import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedhead
from fusedhead.report import observers
from fusedhead.report.report import Report
from fusedhead.run.enable import Method
from fusedhead.run.import_hooks import after_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("accelerate", "transformers")]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    yield tmp_path
    fusedhead.disable()
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(folder: Path, name: str, text: str) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        folder = folder / parent
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / f"{last}.py").write_text(text)


def test_the_action_runs_after_the_import_and_before_the_importer_goes_on(package: Path) -> None:
    write(package, "late_one", "value = 1")
    seen = []
    after_import("late_one", lambda module: seen.append(module.value))
    assert seen == []
    late = importlib.import_module("late_one")
    assert seen == [1]
    assert late.__spec__.loader.get_source("late_one") == "value = 1"  # the loader is the real one


def test_what_is_imported_is_handled_at_once_and_leaves_no_finder() -> None:
    finders, seen = list(sys.meta_path), []
    after_import("json", seen.append)
    assert (seen, list(sys.meta_path)) == ([sys.modules["json"]], finders)


def test_who_stops_waiting_is_not_called(package: Path) -> None:
    write(package, "late_two", "")
    finders, seen = list(sys.meta_path), []
    stop = after_import("late_two", seen.append)
    stop()
    assert list(sys.meta_path) == finders
    importlib.import_module("late_two")
    assert seen == []


def test_an_action_that_raises_does_not_break_the_import(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(package, "late_three", "value = 3")

    def broken(module: object) -> None:
        raise RuntimeError("broken action")

    after_import("late_three", broken)
    assert importlib.import_module("late_three").value == 3
    assert "broken action" in caplog.text


def test_a_module_that_fails_to_import_fails_as_it_would(package: Path) -> None:
    write(package, "late_four", "raise OSError('theirs')")
    seen = []
    stop = after_import("late_four", seen.append)
    with pytest.raises(OSError, match="theirs"):
        importlib.import_module("late_four")
    assert seen == []
    write(package, "late_four", "value = 'mended now'")
    importlib.invalidate_caches()
    importlib.import_module("late_four")
    assert len(seen) == 1
    stop()


ACCELERATE = """
import copy
import enum

class Contains(enum.EnumMeta):
    def __contains__(cls, item):
        try:
            cls(item)
        except ValueError:
            return False
        return True

class DynamoBackend(str, enum.Enum, metaclass=Contains):
    NO = "NO"
    INDUCTOR = "INDUCTOR"
"""


def test_accelerates_enumeration_accepts_the_name_while_enabled(package: Path) -> None:
    write(package, "accelerate.utils.dataclasses", ACCELERATE)
    fusedhead.enable()
    backends = importlib.import_module("accelerate.utils.dataclasses").DynamoBackend
    member = backends("FUSEDHEAD")
    assert isinstance(member, enum.Enum)
    assert (member.value, member.name, member.lower()) == ("FUSEDHEAD", "FUSEDHEAD", "fusedhead")
    assert member is backends("FUSEDHEAD")
    assert member != backends.NO
    assert "FUSEDHEAD" in backends
    assert pickle.loads(pickle.dumps(member)) is member
    assert [change.state for change in fusedhead.changes() if "accelerate" in change.where] == ["made"]
    with pytest.raises(ValueError, match="NOTHING"):
        backends("NOTHING")
    fusedhead.disable()
    with pytest.raises(ValueError, match="FUSEDHEAD"):
        backends("FUSEDHEAD")


TRANSFORMERS_LOGGING = """
import functools, logging

@functools.lru_cache(None)
def warning_once(self, *args, **kwargs):
    self.warning(*args, **kwargs)

logging.Logger.warning_once = warning_once
"""


def test_a_warning_between_head_and_loss_does_not_split_the_graph(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(logging.Logger, "warning_once", raising=False)
    monkeypatch.setattr(logging.Logger, "warning_once", None, raising=False)  # so that it is taken away again
    write(package, "transformers.utils.logging", TRANSFORMERS_LOGGING)
    fusedhead.enable()
    importlib.import_module("transformers.utils.logging")
    logger = logging.getLogger("a.model")

    def forward(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logits = h @ w.T
        logger.warning_once("the loss type is not known")  # type: ignore[attr-defined]
        return F.cross_entropy(logits, y)

    heard: list[Report] = []
    remove = observers.add(heard.append)
    w = torch.randn(64, 16, requires_grad=True)
    torch.compile(forward)(torch.randn(8, 16), w, torch.randint(0, 64, (8,))).backward()
    remove()
    assert [head.fused for report in heard for head in report.heads] == [True]


def test_skipped_logging_does_not_disturb_the_records_of_a_compilation() -> None:
    """Torch 2.11 sorts its settings and writes them as JSON."""
    methods = [Method(getattr(logging.Logger, name)) for name in ("warning", "info")]
    skipped = set(methods)
    assert logging.Logger.info in skipped
    assert logging.Logger.debug not in skipped
    assert json.dumps(sorted(copy.deepcopy(skipped))) == '["info", "warning"]'
    skipped.difference_update(methods)
    assert not skipped

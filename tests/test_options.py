"""What a user gets wrong in options and variables is said with the nearest name that is right."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusedhead
from fusedhead import options


@pytest.fixture(autouse=True)
def looked_at_anew() -> Iterator[None]:
    options.check_environment.cache_clear()
    yield
    options.check_environment.cache_clear()


def test_an_unknown_variable_is_warned_of_once_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in __import__("os").environ if name.startswith(options.ENVIRONMENT)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FUSEDHEAD_MEMRY", "64")
    monkeypatch.setenv("FUSEDHEAD_TILES", "/tmp/tiles.json")
    for _ in range(2):
        assert options.split_options(None)[0].memory == "auto"
    (record,) = caplog.records
    assert "nothing reads the variable FUSEDHEAD_MEMRY, did you mean 'FUSEDHEAD_MEMORY'?" in record.getMessage()


def test_every_variable_that_the_package_reads_is_known() -> None:
    package = Path(fusedhead.__file__).parent
    read = {
        name
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name in re.findall(r"^FUSEDHEAD_[A-Z_]+$", node.value)
    }
    readable = {*options.PLACES, *(options.ENVIRONMENT + name.upper() for name in options.READERS)}
    assert read <= readable, f"fusedhead.options would warn of {read - readable}"


def test_an_option_without_its_prefix_hints_at_it_unless_inductor_has_one() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'memory', did you mean 'fusedhead\.memory'"):
        options.split_options({"memory": 64})
    assert options.split_options({"debug": True})[1] == {"debug": True}  # Inductor's own


def test_the_nearest_name_comes_before_all_of_them() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'memroy', did you mean 'memory'\? The valid ones are debug"):
        fusedhead.enable(memroy=64)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"unknown option 'zzz'; the valid ones are debug"):
        fusedhead.enable(zzz=64)  # type: ignore[call-arg]

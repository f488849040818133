"""Tests are found from what they test: a module of more than 40 lines of code has a test file named after it.

`canonicalize/merge_chunks.py` is tested by `tests/canonicalize/test_merge_chunks.py`; where two modules of a layer
share a name, the folder goes before it: `kernels/tokenwise/engine.py`, `tests/kernels/test_tokenwise_engine.py`.
Rules are tested op by op: `tests/rules/test_rules.py` says that none is left out. So are tables of reasons, in
`tests/rules/test_reasons.py`. Where a module has a folder of tests to itself (`compat`), that is its test file.
"""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.order import ALONE, LAST, TOGETHER, group, place

ROOT = Path(__file__).parents[1]
LINES = 40  # of code: statements, without docstrings, imports and comments


def lines_of_code(file: Path) -> int:
    """Lines on which code stands, imports and docstrings left out."""
    tree = ast.parse(file.read_text())
    code: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, (ast.stmt, ast.expr)) and not isinstance(node, (ast.Import, ast.ImportFrom)):
            code.add(node.lineno)
    return len(code)


def modules() -> dict[str, Path]:
    """The modules that have logic, as ``layer/.../name``, without the package's own folder."""
    files = {}
    for top in ("fusion_pass", "lowering", "kernels"):
        for file in sorted((ROOT / top).rglob("*.py")):
            if not file.name.startswith("__") and lines_of_code(file) > LINES:
                files[str(file.relative_to(ROOT).with_suffix("")).removeprefix("fusion_pass/")] = file
    return files


def has_a_test_file(module: str, file: Path) -> bool:
    """Whether a test file is named after a module."""
    (layer, *_), folder, name = module.split("/"), module.split("/")[-2:-1], module.split("/")[-1]
    if name == "reasons" or (layer == "rules" and "rule(" in file.read_text()):
        return True
    if not folder and (ROOT / "tests" / name).is_dir():
        return True
    place = ROOT / "tests" / (layer if folder else "")
    names = (name, "_".join([*folder, name]))
    return any((place / f"test_{each}.py").exists() for each in names)


def test_every_module_with_logic_has_a_test_file_named_after_it() -> None:
    untested = {module for module, file in modules().items() if not has_a_test_file(module, file)}
    assert untested == set(), "each needs tests/<layer>/test_<module>.py"


def test_what_runs_first_and_together_is_there() -> None:
    for path in (*" ".join(TOGETHER).split(), *ALONE, *LAST):
        assert (ROOT / path).exists(), path
    assert group("tests/run/test_cli.py::test_a") == group("tests/run/test_enable.py::test_b")
    assert group("tests/graph/test_nodes.py::test_a") == group("tests/graph/test_nodes.py::test_b[c]")
    assert group("tests/fuzz/test_fuzz.py::test_a") != group("tests/fuzz/test_fuzz.py::test_b")
    places = [place(f"{path}::test_a") for path in (TOGETHER[-1], "tests/graph/test_nodes.py", LAST[0])]
    assert places == sorted(set(places))


class Worker:
    """Of xdist: what it is told to run."""

    shutting_down = False

    def __init__(self) -> None:
        self.told: list[list[int]] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.told.append(indices)

    def shutdown(self) -> None:
        self.shutting_down = True


def test_a_worker_is_handed_a_whole_group_at_once(pytestconfig: pytest.Config) -> None:
    pytest.importorskip("xdist")
    names = ["run/test_cli.py::a", "run/test_enable.py::b[c::d]", "graph/test_nodes.py::e[f]", "graph/test_nodes.py::g",
             "ir/test_expr.py::h", "ir/test_expr.py::i"]  # fmt: skip
    config = SimpleNamespace(option=SimpleNamespace(), getvalue={"tx": ["popen"]}.get)
    made = pytestconfig.hook.pytest_xdist_make_scheduler(config=config, log=None)
    worker = Worker()
    made.add_node(worker)
    made.add_node_collection(worker, [f"tests/{name}" for name in names])
    made.schedule()
    for test in range(len(names)):
        made.mark_test_complete(worker, test)
    assert worker.told == [[0, 1], [2, 3], [4], [5]]

"""What one touches to add an op rule, a statistic, an engine or a kernel, as the README's table says.

A pass is added in `test_pipeline.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.kernels.torch_engine import engine as torch_engine
from fusedhead.lowering import engines
from fusedhead.lowering.plan import plan
from fusedhead.rules import RULES
from fusedhead.rules.table import rule
from tests.eager_stack import Rewritten
from tests.programs.claims import D, hidden, labels, weight
from tests.test_layers import ROOT

aten = torch.ops.aten
TABLE = re.compile(r"^\| (an? [\w ]+) \| (.+) \|$", re.MULTILINE)
PLACES = dict(TABLE.findall((ROOT / "README.md").read_text(encoding="utf-8")))


def test_every_file_and_folder_that_the_table_names_is_there() -> None:
    assert list(PLACES) == ["an op rule", "a pass", "a statistic", "an engine", "a kernel"]
    for text in PLACES.values():
        for name in re.findall(r"`([\w/]+(?:/|\.py))`", text):
            assert any((ROOT / top / name).exists() for top in ("", "kernels/triton_engine")), name


def negated(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(-F.linear(h, w), y)


@pytest.fixture
def rules() -> Iterator[dict[Any, Any]]:
    """The table of rules, which is afterwards what it was: its order is that of the reference."""
    before = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(before)


def test_an_op_rule_is_one_function(rules: dict[Any, Any]) -> None:
    read = rules.pop(aten.neg.default)
    inputs = hidden(6, D), weight(), labels(6)
    without, with_it = Rewritten(negated), Rewritten(negated)
    without(*inputs)
    assert without.report.heads[0].computes.startswith("rowwise")  # token by token: slower
    torch._dynamo.reset()
    rule(aten.neg.default)(read)  # the only line that a new rule needs besides the function
    torch.testing.assert_close(with_it(*inputs), negated(*inputs))
    assert [(head.fused, head.computes[:13]) for head in with_it.report.heads] == [(True, "cross_entropy")]


STATISTIC = "variance"
WRITTEN_IN = {  # the files of the README's row, one for each step from the definition to the program's op
    "kernels/contract.py",
    "kernels/torch_engine/statistics.py",
    "kernels/triton_engine/sweeps/statistics.py",
    "kernels/triton_engine/rows/merge.py",
    "fusion_pass/rules/reductions.py",
}
BESIDES = {  # and where a head lies in shards, or where it makes one faster
    "lowering/shard_merge.py": "the merge of the ranks' statistics",
    "kernels/triton_engine/launch/sweep.py": "a smaller tile, so that registers do not spill",
}


def words(file: Path) -> Iterator[str]:
    """The attributes, names, keywords and strings of a file, docstrings left out."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_a_statistic_is_written_in_five_files() -> None:
    files = [file for top in ("fusion_pass", "lowering", "kernels") for file in (ROOT / top).rglob("*.py")]
    naming = {str(file.relative_to(ROOT)) for file in files if STATISTIC in set(words(file))}
    assert naming == WRITTEN_IN | set(BESIDES)
    row = PLACES["a statistic"]
    for file in WRITTEN_IN - {"fusion_pass/rules/reductions.py"}:
        assert file in row or file.removeprefix("kernels/triton_engine/") in row


def test_an_engine_is_a_class_and_an_entry_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(engines.TorchWindows):
        name = "counted windows"

        def head_loss(self, *args):
            calls.append(1)
            return torch_engine.head_loss(*args)

    calls: list[int] = []
    monkeypatch.setattr(engines, "ENGINES", (Counted(), *engines.ENGINES))
    rewritten, inputs = Rewritten(negated), (hidden(6, D), weight(), labels(6))
    plan._planned.cache_clear()  # of the engines that were there
    try:
        torch.testing.assert_close(rewritten(*inputs), negated(*inputs))
    finally:
        plan._planned.cache_clear()
    assert calls
    assert rewritten.report.heads[0].engine.startswith("counted windows")


def test_a_kernel_and_its_launch_stand_in_one_file() -> None:
    for folder in ("sweeps", "rows"):
        for file in sorted((ROOT / "kernels/triton_engine" / folder).glob("*.py")):
            functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
            kernels = {f.name for f in functions if f.name.endswith("_kernel")}
            bound = {node.id for f in functions for node in ast.walk(f) if isinstance(node, ast.Name)} & kernels
            assert bound == kernels, f"{file}: launched elsewhere: {kernels - bound}"

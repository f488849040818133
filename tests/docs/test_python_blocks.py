"""Every Python block of README.md and docs/ runs, in the order of its page, on what the page has defined before.

A page starts from the imports and the model that the README shows. Graphs are rewritten by the pass and executed as
they are, so that a block costs milliseconds: Inductor is not what is tested here. A block that needs packages which are
not installed is compiled only; `make e2e` has them.
"""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import fusedhead
from fusedhead import backend
from tests.docs.blocks import ROOT, Block, blocks, pages
from tests.eager_stack import as_it_is

README = ROOT / "README.md"
PYTHON = {page: found for page in pages() if (found := [b for b in blocks(page) if b.language == "python"])}


def namespace() -> dict[str, object]:
    return {"torch": torch, "F": F, "nn": nn, "fusedhead": fusedhead}


def runs(block: Block, names: dict[str, object]) -> None:
    padded = "\n" * (block.line - 1) + block.text  # so that an error names the page's line
    code = compile(padded, block.page, "exec")
    if all(find_spec(package) for package in block.needs):
        exec(code, names)


@pytest.fixture(autouse=True)
def executed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor's place is taken by nothing, and what `enable` has done is undone."""
    monkeypatch.setattr(backend, "Inductor", lambda *_: as_it_is)
    yield
    fusedhead.disable()


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(page: object) -> None:
    names = namespace()
    with contextlib.redirect_stdout(io.StringIO()):
        if page != README:
            for block in PYTHON[README]:
                runs(block, names)
        for block in PYTHON[page]:  # type: ignore[index]
            runs(block, names)


def test_the_readme_s_model_is_fused() -> None:
    names = namespace()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for block in PYTHON[README]:
            runs(block, names)
    assert "1 head fused, 0 left" in said.getvalue()


def test_examples_in_docstrings_are_python() -> None:
    """Blocks that begin with `>>>` would be skipped above."""
    assert not [block.where for result in PYTHON.values() for block in result if ">>>" in block.text]
    assert all(ast.parse(block.text) for result in PYTHON.values() for block in result)

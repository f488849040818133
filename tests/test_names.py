"""A public name means one thing in the package, a file is named by a noun or a verb, a variable by what it holds."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from tests.test_layers import ROOT, SOURCES

SHARED = {  # a name that several files define, and why
    "run": "the entry of a pass",
    "main": "the entry of a command",
    "log": "the logger of a module; in a kernel the logarithm",
    "aten": "torch.ops.aten",
    "add_arguments": "the protocol of a command (run/cli.py)",
    "execute": "the same protocol",
    "FusedHeadCallback": "the callback of a trainer, in the module that is named after the trainer",
    "head_stats": "the protocol of an engine (lowering/engines.py)",
    "head_stats_backward": "the same protocol",
    "other_columns_serve": "the same protocol",
    "head_loss": "the same protocol",
}
FILES = [file for folder in SOURCES for file in sorted((ROOT / folder).rglob("*.py"))]


def assigned(node: ast.AST) -> Iterator[str]:
    """The names that a statement defines, in every branch."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = (n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
        yield from (name.id for name in names if isinstance(name.ctx, ast.Store))
    elif isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
        for child in ast.iter_child_nodes(node):
            yield from assigned(child)


def test_a_public_name_is_defined_in_one_file() -> None:
    files: dict[str, set[str]] = defaultdict(set)
    for file in FILES:
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            for name in assigned(statement):
                files[name].add(str(file.relative_to(ROOT)))
    twice = {name: where for name, where in files.items() if len(where) > 1 and not name.startswith("_")}
    assert {name: where for name, where in twice.items() if name not in SHARED} == {}
    assert set(SHARED) == set(twice)


def test_no_file_is_named_by_a_participle() -> None:
    alike = {"pointwise_codegen", "duplicate_transposed"}  # a noun; the logits that a verb is of
    assert not {file.stem for file in FILES if file.stem.endswith(("ed", "en"))} - alike


NO_NOUNS = {"found", "given", "made", "known", "own", "others", "here", "there"}
# Arguments of kernels, whose names are part of their compiled code; and the files of token programs.
NAMED_OTHERWISE = ("kernels/triton_engine", "kernels/tokenwise")


def test_a_variable_is_named_by_what_it_holds() -> None:
    named: dict[str, set[str]] = defaultdict(set)
    for file in FILES:
        place = str(file.relative_to(ROOT))
        for node in () if place.startswith(NAMED_OTHERWISE) else ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in NO_NOUNS:
                named[place].add(node.id)
            elif isinstance(node, ast.arg) and node.arg in NO_NOUNS:
                named[place].add(node.arg)
    assert named == {}

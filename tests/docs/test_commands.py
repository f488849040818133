"""Every command of README.md, CONTRIBUTING.md and docs/ exists, and takes the options that it is given there.

Commands are the indented blocks. They are read, not run: what they do is tested where it is written.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from fusedhead.options import ENVIRONMENT, READERS
from fusedhead.run.cli import main
from tests.docs.blocks import ROOT, blocks, pages

READERS_PROGRAMS = {"train.py", "package.train"}  # which stand for a program of the reader's
OTHERS = {"accelerate", "tune", "pip", "python"}  # commands of other packages, whose options are theirs
ASSIGNED = re.compile(r"([A-Z_]+)=\S*")


def commands() -> list[tuple[str, str]]:
    """(place, command) for every line of every block of commands."""
    results = []
    for page in pages():
        for block in blocks(page):
            if block.language not in ("", "bash", "sh"):
                continue
            joined = block.text.replace("\\\n", " ")
            results += [(block.where, line.strip()) for line in joined.splitlines() if line.strip()]
    return results


@cache
def targets() -> set[str]:
    """What `make` can make."""
    return set(re.findall(r"^([a-z]\w*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def help_of(command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([command, "--help"])
    return said.getvalue()


def options(words: Sequence[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def check_fusedhead(words: Sequence[str]) -> None:
    command, rest = words[0], list(words[1:])
    said = help_of(command)
    assert said, f"fusedhead has no command {command}"
    options = []
    while rest and rest[0].startswith("-"):
        options.append(rest.pop(0))
        if rest and re.search(rf"{re.escape(options[-1])} [A-Z{{a-z]", said) and options[-1] != "-m":
            rest.pop(0)
    assert not [option for option in options if option not in said], options
    if command == "run":
        check_program(rest)


def check_program(words: Sequence[str]) -> None:
    """A script and its options."""
    script = words[0]
    if script in READERS_PROGRAMS:
        return
    check_source(ROOT / script, words[1:])


def check_source(file: Path, words: Sequence[str]) -> None:
    assert file.is_file(), file
    text = file.read_text(encoding="utf-8")
    for option in options(words):
        assert f'"{option}"' in text, f"{file.name} has no option {option}"


def check_module(words: Sequence[str]) -> None:
    module, rest = words[0], words[1:]
    if module == "fusedhead":
        return check_fusedhead(rest)
    spec = find_spec(module)
    assert spec is not None, f"no module {module}"
    if module.split(".")[0] in ("fusedhead", "benchmarks", "tests"):
        if spec.submodule_search_locations:
            spec = find_spec(f"{module}.__main__")
        assert spec is not None
        assert spec.origin is not None
        check_source(Path(spec.origin), rest)
    return None


def check(command: str) -> None:
    words = shlex.split(command, comments=True)
    while words and (assigned := ASSIGNED.fullmatch(words[0])):
        if assigned[1].startswith("FUSEDHEAD_"):
            assert assigned[1] in variables(), assigned[1]
        words.pop(0)
    name, *rest = words
    if name == "make":
        for word in rest:
            assert "=" in word or word in targets(), f"no target {word}"
    elif name == "fusedhead":
        check_fusedhead(rest)
    elif name == "torchrun":
        arguments = get_args_parser().parse_args(rest)
        program = [arguments.training_script, *arguments.training_script_args]
        check_module(program) if arguments.module else check_program(program)
    elif name == "python":
        check_module(rest[1:]) if rest[0] == "-m" else check_program(rest)
    else:
        assert name in OTHERS, f"{name} is no command that is known"
        if "-m" in rest:
            check_module(rest[rest.index("-m") + 1 :])


@cache
def variables() -> set[str]:
    """The environment variables that the sources read."""
    files = [file for folder in ("fusion_pass", "lowering", "kernels") for file in (ROOT / folder).rglob("*.py")]
    named = {name for file in files for name in re.findall(r"FUSEDHEAD_[A-Z_]+", file.read_text(encoding="utf-8"))}
    return named | {ENVIRONMENT + name.upper() for name in READERS}


@pytest.mark.parametrize(("where", "command"), commands())
def test_a_command_exists_and_takes_its_options(where: str, command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "wrong",
    ["make nothing", "fusedhead run --no-such-option train.py", "python examples/none.py", "python -m fusedhead.none",
     "python examples/classifier.py --colour red", "torchrun --procs 2 train.py", "FUSEDHEAD_NONE=1 python train.py",
     "nonsense"],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_found(wrong: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check(wrong)

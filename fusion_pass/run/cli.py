"""The command ``fusedhead``: ``fusedhead run script.py`` runs a program with fusedhead in place of Inductor.

The program is not changed and need not know: whatever it compiles goes through the pass, its output, exit
code and exceptions are its own, and what fusedhead did is printed to stderr after it has ended. Under a
launcher every process does the same and the first of them prints: ``torchrun --nproc-per-node 8 -m fusedhead
run train.py``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedhead.report.summary import Summary

USAGE = "fusedhead run [options] (script.py | -m module) [arguments of the program ...]"


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="fusedhead",
        usage=USAGE,
        description="Run a PyTorch program with fusedhead in place of Inductor, without changing it.",
        epilog="With a launcher: torchrun ... -m fusedhead run train.py, or accelerate launch -m fusedhead "
        "run train.py. Processes that the program itself starts afresh (spawn) call fusedhead.enable().",
        allow_abbrev=False,
    )
    command.add_argument("command", choices=["run"])
    command.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m does")
    command.add_argument(
        "--compile-eager", action="store_true", help="compile the models of a program that compiles nothing"
    )
    command.add_argument("--report", metavar="OUT.html", help="write a page about every head and graph")
    command.add_argument("--strict", action="store_true", help="stop where a head is not fused")
    command.add_argument("--debug", action="store_true", help="print every rewritten graph")
    command.add_argument("--memory", metavar="auto|min|MIB", help="workspace of a head")
    command.add_argument("--logits", metavar="deferred|eager", help="what becomes of logits that are returned")
    command.add_argument("--min-logits", metavar="auto|N", help="heads with fewer logits are left to Inductor")
    command.add_argument("--quiet", action="store_true", help="print nothing at the end")
    return command


def split(command: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the program with its own, which may look like ours."""
    takes_value = {flag for action in command._actions if action.nargs is None for flag in action.option_strings}
    rest = list(arguments)
    own = [rest.pop(0)] if rest else []  # "run"
    while rest and rest[0].startswith("-") and rest[0] != "-":
        own.append(rest.pop(0))
        if own[-1] in takes_value and rest:
            own.append(rest.pop(0))
        if own[-1] == "-m":
            break
    return own, rest


def options_of(given: argparse.Namespace) -> dict[str, object]:
    """The backend's options that were given; the others keep their defaults."""
    flags = {name: True for name in ("strict", "debug") if getattr(given, name)}
    named = {name: getattr(given, name) for name in ("memory", "logits", "min_logits")}
    values = {name: value for name, value in named.items() if value is not None}
    return {**flags, **values}


def first_of_the_launch() -> bool:
    """Whether this process is the one of a distributed program that speaks."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says and return the exit code; exceptions are shown as Python would."""
    command = parser()
    own, rest = split(command, sys.argv[1:] if arguments is None else arguments)
    given = command.parse_args(own)
    if not rest:
        command.error("nothing to run")

    from fusedhead.report import observers
    from fusedhead.report.summary import Summary
    from fusedhead.run import compile_eager, launcher
    from fusedhead.run.enable import enable

    name, *rest = rest
    try:
        enable(**options_of(given))
    except ValueError as error:
        command.error(str(error))
    speaks = first_of_the_launch()
    summary = Summary(keep_graphs=speaks and given.report is not None)
    observers.add(summary.add)
    if given.compile_eager:
        compile_eager.watch_optimizers(strict=given.strict)
    found = None
    try:
        found = launcher.module(name) if given.module else launcher.script(name)
        launcher.run(found, rest)
    except launcher.CannotRun as error:
        print(f"fusedhead: {error}", file=sys.stderr)
        return 2
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        launcher.own_traceback(error, found)
        sys.excepthook(type(error), error, error.__traceback__)  # which the program may have replaced
        return 1
    finally:
        if speaks and found is not None:
            tell(summary, given, [name, *rest])
    return 0


def tell(summary: Summary, given: argparse.Namespace, command_line: Sequence[str]) -> None:
    """Print the summary to stderr and write the page. The program's outcome stays what it is."""
    sys.stdout.flush()
    summary.publish()
    if not given.quiet:
        print(summary, file=sys.stderr, flush=True)
    if given.report is None:
        return
    try:
        from fusedhead.report.html import page

        with open(given.report, "w", encoding="utf-8") as file:
            file.write(page(summary, shlex.join(command_line)))
    except OSError as error:
        print(f"fusedhead: the report could not be written: {error}", file=sys.stderr)

"""``fusedhead run``: runs an unchanged program with fusedhead instead of Inductor, and prints a report at the end.

Everything that the program compiles goes through the pass. Its output, exit code and exceptions stay the same, and the
report is printed to stderr after it has ended. Under a launcher every process does the same, and the first of them
prints: ``torchrun --nproc-per-node 8 -m fusedhead run train.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedhead.eager.tied_heads import embedding_note
from fusedhead.report import observers
from fusedhead.report.summary import Summary
from fusedhead.report.terminal import show
from fusedhead.run import compile_eager, launcher, report_file
from fusedhead.run.enable import enable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m does")
    parser.add_argument(
        "--compile-eager", action="store_true", help="compile the models of a program that compiles nothing"
    )
    parser.add_argument(
        "--report", metavar="OUT", help="write what became of every head: a page to OUT.html, or data to OUT.json"
    )
    parser.add_argument("--strict", action="store_true", help="stop where a head is not fused")
    parser.add_argument("--debug", action="store_true", help="print every rewritten graph")
    parser.add_argument("--memory", metavar="auto|min|MIB", help="workspace of a head")
    parser.add_argument("--logits", metavar="deferred|eager", help="what becomes of logits that are returned")
    parser.add_argument("--min-logits", metavar="auto|N", help="heads with fewer logits are left to Inductor")
    parser.add_argument("--quiet", action="store_true", help="print nothing at the end")


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The backend's options on the command line; others keep their defaults."""
    flags = {name: True for name in ("strict", "debug") if getattr(arguments, name)}
    named = {name: getattr(arguments, name) for name in ("memory", "logits", "min_logits")}
    values = {name: value for name, value in named.items() if value is not None}
    return {**flags, **values}


def first_of_the_launch() -> bool:
    """Whether this process is the one of a distributed program that prints."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def execute(arguments: argparse.Namespace, parser: argparse.ArgumentParser, rest: Sequence[str]) -> int:
    """Run the program; its exceptions are shown as Python would."""
    if not rest:
        parser.error("nothing to run")
    name, *words = rest
    speaks = first_of_the_launch()
    if speaks and arguments.report is not None and (problem := report_file.path_problem(arguments.report)):
        parser.error(problem)
    try:
        enable(**options_of(arguments))
    except ValueError as error:
        parser.error(str(error))
    summary = Summary(keep_graphs=speaks and arguments.report is not None)
    observers.add(summary.add, texts=summary.keep_graphs)
    if arguments.compile_eager:
        compile_eager.watch_optimizers(strict=arguments.strict)
    program, answered = None, False
    try:
        program = launcher.module(name) if arguments.module else launcher.script(name)
        launcher.run(program, words)
    except launcher.CannotRun as error:
        print(f"fusedhead: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        answered = not summary.graphs and of_a_library(stop)
        raise
    except KeyboardInterrupt:
        show_own_frames(program)
        raise
    except BaseException as error:
        launcher.own_traceback(error, program)
        sys.excepthook(type(error), error, error.__traceback__)  # the program may have replaced it
        return 1
    finally:
        if speaks and program is not None and not answered:
            tell(summary, arguments, [name, *words])
    return 0


def of_a_library(stop: SystemExit) -> bool:
    """Whether a library ended the program before it ran, as argparse does after ``--help`` and errors."""
    trace = stop.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename if trace is not None else ""
    installed = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(Path(file).is_relative_to(folder) for folder in installed)


def show_own_frames(program: launcher.Program | None) -> None:
    """Make Python, which prints an interrupt's traceback and ends by the signal, print the program's frames only."""
    hook = sys.excepthook

    def shown(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        launcher.own_traceback(error, program)
        hook(kind, error, error.__traceback__)

    sys.excepthook = shown


def tell(summary: Summary, arguments: argparse.Namespace, command_line: Sequence[str]) -> None:
    """Print the summary to stderr and write the report. An error here does not change the program's outcome."""
    with contextlib.suppress(OSError, ValueError):  # a closed pipe, or a stream that the program has closed
        sys.stdout.flush()
    if arguments.compile_eager and (note := compile_eager.unreached()):
        summary.notes.append(note)
    if note := embedding_note((head.vocab_size, head.hidden_size) for head in summary.heads()):
        summary.notes.append(note)
    summary.publish()
    if not arguments.quiet:
        with contextlib.suppress(OSError, ValueError):
            show(summary.overview(), sys.stderr)
    if arguments.report is None:
        return
    try:
        report_file.write(summary, arguments.report, shlex.join(command_line))
    except OSError as error:
        print(f"fusedhead: the report could not be written: {error}", file=sys.stderr)

"""``fusedhead estimate train.py``: runs a whole program on fake tensors until it ends or reads a number."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fusedhead.estimate import Estimator, estimate_fake_mode
from fusedhead.options import split_options
from fusedhead.report.rates import CHIPS, chip_named
from fusedhead.run import compile_eager, launcher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m does")
    parser.add_argument(
        "--compile-eager", action="store_true", help="look at the models of a program that compiles nothing"
    )
    parser.add_argument("--chip", choices=CHIPS, help="for which chip; this machine's GPU, or h100 where it has none")


def execute(arguments: argparse.Namespace, parser: argparse.ArgumentParser, rest: Sequence[str]) -> int:
    if not rest:
        parser.error("nothing to run")
    name, *words = rest
    estimator = Estimator(chip_named(arguments.chip), split_options(None)[0])
    program, stopped, code = None, "", 0
    try:
        program = launcher.module(name) if arguments.module else launcher.script(name)
        with in_place_of_compilers(estimator), estimate_fake_mode():
            if arguments.compile_eager:
                compile_eager.watch_optimizers()
            launcher.run(program, words)
    except launcher.CannotRun as error:
        print(f"fusedhead: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        raise
    except SystemExit as stop:
        stopped = "" if stop.code in (None, 0) else f"the program ended with {stop.code!r}"
    except BaseException as error:
        code = 0 if estimator.graphs else 1  # a program that reads a number after a graph ends here
        stopped = f"{program_line(error, program)}: {type(error).__name__}: {first_line(error)}"
    print(estimator.result(stopped))
    if not estimator.graphs:
        print("  the program compiled nothing: --compile-eager looks at its models", file=sys.stderr)
    return code


@contextmanager
def in_place_of_compilers(estimator: Estimator) -> Iterator[None]:
    """``torch.compile`` with the estimator as its backend, whichever was named. Backward passes are watched."""
    compile_, backward, grad = torch.compile, torch.autograd.backward, torch.autograd.grad

    def compiled(model: Any = None, **settings: Any) -> Any:
        if model is None:  # a decorator with settings
            return lambda model: compiled(model, **settings)
        shared = {key: value for key, value in settings.items() if key in ("fullgraph", "dynamic", "disable")}
        return compile_(model, backend=estimator, **shared)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with estimator.live:
                return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(torch, "compile", compiled),
        mock.patch.object(torch.autograd, "backward", watched(backward)),
        mock.patch.object(torch.autograd, "grad", watched(grad)),
    ):
        yield


def program_line(error: BaseException, program: launcher.Program | None) -> str:
    """The innermost line of the program in the error's traceback."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if program is not None and Path(file).parent == Path(program.file).parent:
            place = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place or "the program"


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")

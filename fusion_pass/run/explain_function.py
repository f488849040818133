"""``fusedhead explain MODULE:FUNCTION``: `fusedhead.explain` from the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from fusedhead.explain import explain
from fusedhead.report.terminal import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="package.module:name, looked for here too")
    parser.add_argument("--graphs", action="store_true", help="print the graphs before and after as well")
    parser.add_argument("--json", action="store_true", help="print data in place of a table")


def execute(arguments: argparse.Namespace, parser: argparse.ArgumentParser, rest: Sequence[str]) -> int:
    try:
        function = find(arguments.function)
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"{arguments.function}: {error}")
    returned = function()
    if isinstance(returned, tuple) and returned and callable(returned[0]):
        report = explain(returned[0])(*returned[1:])
    else:
        report = explain(function)()
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        show(report.overview(), sys.stdout)
    if arguments.graphs:
        print(f"before:\n{report.before}\nafter:\n{report.after}")
    return 0


def find(name: str) -> Callable[[], Any]:
    """``package.module:path.of.attributes``. Raises ImportError, AttributeError, or ValueError for another form."""
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise ValueError("expected MODULE:FUNCTION, as in train:step")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m
    value: Any = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    if not callable(value):
        raise ValueError(f"this is a {type(value).__name__}, and no function")
    return value

"""Run another program in this process as ``python`` would: a script, a folder or archive, or ``-m module``.

The program sees the same start as under ``python``: ``sys.argv``, ``sys.path[0]``, a module ``__main__`` of its own
that stays for its threads and exit handlers, ``__file__`` and ``__spec__`` as Python sets them (pickle and
multiprocessing read them), its exit code, and a traceback that starts in its own first line.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any


class CannotRun(Exception):
    """The program cannot be found or is no program. The text is that of ``python``."""


@dataclass
class Program:
    """A program to run: its code, and its ``__main__``, ``sys.argv[0]`` and ``sys.path[0]``."""

    code: CodeType
    name: str  # its sys.argv[0]
    file: str
    path: str | None  # its sys.path[0]; None where it is set already
    loader: Any
    spec: ModuleSpec | None = None  # None for a script, as under python
    package: str | None = None


def script(path: str) -> Program:
    """The program of ``python path``. Raises CannotRun, or SyntaxError from the program's text."""
    file = os.path.abspath(path)
    if os.path.isdir(path) or (os.path.isfile(path) and not is_text(path)):
        return folder(path, file)
    try:
        with io.open_code(file) as opened:
            source = opened.read()
    except OSError as error:
        raise CannotRun(f"can't open file {file!r}: [Errno {error.errno}] {error.strerror}") from None
    beside = os.path.dirname(os.path.realpath(path))
    code = compile(source, file, "exec", dont_inherit=True)
    return Program(code, path, file, beside, SourceFileLoader("__main__", file))


def is_text(path: str) -> bool:
    """Whether a file is Python source and not, say, a zip archive with a ``__main__.py``."""
    with open(path, "rb") as file:
        return b"\0" not in file.read(4096)


def folder(path: str, absolute: str) -> Program:
    """The program of ``python folder`` or ``python archive.zip``: the ``__main__`` module inside."""
    spec = PathFinder.find_spec("__main__", [absolute])
    if spec is None or spec.loader is None:
        raise CannotRun(f"can't find '__main__' module in {absolute!r}")
    return Program(code_of(spec), path, spec.origin or "", absolute, spec.loader, spec, "")


def module(name: str) -> Program:
    """The program of ``python -m name``; for a package its ``__main__`` module."""
    put_first(os.getcwd())  # before the module is looked for
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            if name == "__main__" or name.endswith(".__main__"):
                raise CannotRun("Cannot use package as __main__ module")
            name += ".__main__"
            spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise CannotRun(f"Error while finding module specification for {name!r} ({error})") from error
    if spec is None:
        raise CannotRun(f"No module named {name}")
    file = spec.origin or ""
    return Program(code_of(spec), file, file, None, spec.loader, spec, spec.parent)


def code_of(spec: ModuleSpec) -> CodeType:
    code = spec.loader.get_code(spec.name) if hasattr(spec.loader, "get_code") else None  # type: ignore[union-attr]
    if code is None:
        raise CannotRun(f"No code object available for {spec.name}")
    return code


def put_first(path: str) -> None:
    """Replace the entry of ``sys.path`` that Python made for our own command by ``path``."""
    if getattr(sys.flags, "safe_path", False):
        return  # python -P puts nothing there
    if sys.path and same_folder(sys.path[0], started_from()):
        del sys.path[0]
    sys.path.insert(0, path)


def started_from() -> str:
    """The entry that Python made for our own command: the console script's folder, or the current one under ``-m``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return os.getcwd() if spec is not None else os.path.dirname(os.path.realpath(sys.argv[0]))


def same_folder(one: str, other: str) -> bool:
    return os.path.realpath(one or ".") == os.path.realpath(other or ".")


def run(program: Program, arguments: Sequence[str]) -> None:
    """Run the program in a ``__main__`` of its own. Raises all that it raises, including SystemExit."""
    main = ModuleType("__main__")
    vars(main).update(
        __file__=program.file,
        __builtins__=builtins,
        __spec__=program.spec,
        __loader__=program.loader,
        __package__=program.package,
        __cached__=program.spec.cached if program.spec else None,
    )
    if "__annotations__" in vars(sys.modules["__main__"]):  # Python 3.14 makes them when they are asked for
        vars(main)["__annotations__"] = {}
    if program.path is not None:
        put_first(program.path)
    sys.modules["__main__"] = main
    sys.argv = [program.name, *arguments]
    exec(program.code, vars(main))


def own_traceback(error: BaseException, program: Program | None) -> None:
    """Drop the frames above the program's first one, so that the traceback looks as under ``python``."""
    trace = error.__traceback__
    while trace is not None and (program is None or trace.tb_frame.f_code is not program.code):
        trace = trace.tb_next
    error.__traceback__ = trace

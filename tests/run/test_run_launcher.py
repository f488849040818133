"""A program that is run inside this process cannot tell it from python: compared with python itself."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.run.forks import Ours, Outcome

# Everything a program can see of how it was started. Run twice, by python and by us, and the lines compared.
SHOW = """
'''A docstring.'''
import os, pickle, sys, threading, atexit
class Own: pass
names = ("__name__", "__file__", "__package__", "__doc__", "__cached__")
print({name: globals()[name] for name in names}, __spec__ and (__spec__.name, __spec__.origin))
count: int = 1
print(type(__loader__).__name__, __builtins__.__name__, sys.modules["__main__"].__annotations__)
print(sys.argv, sys.path[0], sys.modules["__main__"].Own is Own, pickle.loads(pickle.dumps(Own)) is Own)
from beside import value
print(value)
atexit.register(lambda: print("at exit", Own.__name__))
threading.Timer(0.2, lambda: print("a thread that outlives main", Own.__name__)).start()
"""


def python(*arguments: str, cwd: Path) -> Outcome:
    done = subprocess.run([sys.executable, "-B", *arguments], cwd=cwd, capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "inside"
    (inside / "package").mkdir(parents=True)
    (inside / "package" / "__init__.py").touch()
    (inside / "beside.py").write_text("value = 'imported from beside'\n")
    for path in ("show.py", "package/__main__.py", "package/part.py", "__main__.py"):
        (inside / path).write_text(SHOW)
    with zipfile.ZipFile(inside / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", SHOW)
        archive.writestr("beside.py", "value = 'from the archive'\n")
    return tmp_path


PROGRAMS = {
    "a script": ("inside/show.py", "-m", "--strict", "x"),
    "a folder": ("inside",),
    "an archive": ("inside/archive.zip", "--debug"),
    "a module": ("-m", "show", "a b"),
    "a package": ("-m", "package", "-m"),
    "a module in a package": ("-m", "package.part"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_sees_what_it_sees_under_python(program: str, folder: Path, ours: Ours) -> None:
    command = PROGRAMS[program]
    where = folder / "inside" if command[0] == "-m" else folder
    expected = python(*command, cwd=where)
    assert (expected.code, expected.err) == (0, "")
    assert ours("--quiet", *command, cwd=where) == expected


FAILURES = {
    "an exception": "def f():\n    raise KeyError('mine')\n\nf()\n",
    "an exit code": "import sys\nsys.exit(7)\n",
    "an exit message": "import sys\nsys.exit('out of luck')\n",
    "a cause": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('mine') from e\n",
    "its own hook": "import sys\nsys.excepthook = lambda *a: print('hooked', a[0].__name__)\n1 / 0\n",
    "an interrupt": "def f():\n    raise KeyboardInterrupt\n\nf()\n",
    "no syntax": "print('never')\ndef f(:\n",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_program_fails_as_it_fails_under_python(failure: str, folder: Path, ours: Ours) -> None:
    (folder / "fail.py").write_text(FAILURES[failure])
    expected = python("fail.py", cwd=folder)
    assert expected.code != 0
    assert ours("--quiet", "fail.py", cwd=folder) == expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("nowhere.py",), "No such file or directory"),
        (("-m", "nowhere"), "No module named nowhere"),
        (("-m", "nowhere.inside"), "Error while finding module specification"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(
    command: tuple[str, ...], message: str, folder: Path, ours: Ours
) -> None:
    found = ours(*command, cwd=folder)
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert len(found.err.splitlines()) == 1

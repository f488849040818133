"""A user's program under a checker of types: options are known by name and by value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """\
import fusedhead

fusedhead.enable(memory=256, logits="eager", strict=True)
fusedhead.enable(memroy=256)
fusedhead.enable(logits="never")
fusedhead.enable(debug=3)
report = fusedhead.explain(print)(1)
report.heads[0].fused = True
report.hedas
fusedhead.explain(print, 1)
reveal_type(fusedhead.estimate(print)(1).heads[0].bytes_eager)
"""
# Only what the program sees is read: torch takes a minute.
SETTINGS = """\
[mypy]
follow_imports = skip
[mypy-fusedhead,fusedhead.options,fusedhead.explain,fusedhead.estimate,fusedhead.run.enable,fusedhead.report.report,\
fusedhead.report.head_record,fusedhead.report.step_estimate]
follow_imports = silent
"""


def test_a_misspelt_option_is_an_error_for_mypy(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-version", "3.10"]
    run = subprocess.run([*command, "--no-error-summary", "program.py"], cwd=tmp_path, capture_output=True, text=True)
    said: dict[int, str] = {}
    for line in run.stdout.splitlines():
        said.setdefault(int(line.split(":")[1]), line)
    assert sorted(said) == [4, 5, 6, 9, 10, 11], run.stdout + run.stderr
    assert '"memroy"' in said[4]
    assert "Literal['deferred', 'eager']" in said[5]
    assert "hedas" in said[9]
    assert 'Revealed type is "int"' in said[11].replace("builtins.", "")

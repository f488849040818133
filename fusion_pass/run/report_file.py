"""The file of ``--report``: a page (.html) or data (.json). Its path is checked before the program starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fusedhead.report.export import data
from fusedhead.report.page import page
from fusedhead.report.summary import Summary

KINDS = (".html", ".json")


def path_problem(path: str) -> str:
    """Why a report cannot be written to a path, with the remedy, or ""."""
    file = Path(path)
    folder = file.parent
    if file.suffix.lower() not in KINDS:
        return f"--report {path}: the name of the file has to end in .html (a page) or .json (data)"
    if file.is_dir():
        return f"--report {path}: this is a folder; name a file in it"
    if not folder.is_dir():
        return f"--report {path}: there is no folder {folder}; make it first"
    if not os.access(file if file.exists() else folder, os.W_OK):
        return f"--report {path}: no permission to write there"
    return ""


def write(summary: Summary, path: str, command: str) -> None:
    """Write the report. ``command``: the command that was run. Raises OSError."""
    if Path(path).suffix.lower() == ".json":
        text = json.dumps({"command": command, **data(summary.overview())}, indent=1) + "\n"
    else:
        text = page(summary, command)
    Path(path).write_text(text, encoding="utf-8")

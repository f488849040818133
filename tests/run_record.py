"""A long run of programs on record: one line of JSON for each, so that a process that ends early costs one program.

`programs_left` skips what a record beside it has seen. A program that ends its process, or is past its time (whose
stack `faulthandler` then writes into the log, also out of a kernel in C++), is known by its first line without a
second, and counted as "ended the process" by the next run.
"""

from __future__ import annotations

import faulthandler
import json
from pathlib import Path
from typing import Any

UNENDED = "ended the process"


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The last line of each program of every record in a folder; one that has begun and not ended has kind UNENDED."""
    results: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                of = json.loads(line)
            except ValueError:  # half a line, of a process that was ended as it wrote
                continue
            if "name" in of and ("kind" in of or of["name"] not in results):
                results[of["name"]] = {"kind": UNENDED, **of}
    return results


class RunRecord:
    """The record of one process. Without a file nothing is kept, and nothing has a time limit."""

    def __init__(self, file: str, seconds: float) -> None:
        self.seconds = seconds
        self.seen: set[str] = set()
        self.file: Any = None
        if file:
            path = Path(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.seen = set(lines_of(path.parent))
            self.file = path.open("a", buffering=1)
            self.stacks = path.with_suffix(".stacks").open("a", buffering=1)
            self.kept = self.stacks.tell()  # up to here: of processes that were ended
            faulthandler.enable(self.stacks)

    def begin(self, name: str) -> None:
        self._write({"name": name})
        self.watch()

    def watch(self) -> None:
        """From now on the time counts, and what was noted is forgotten."""
        if self.file is None:
            return
        self.stacks.truncate(self.kept)
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.stacks)

    def note(self, line: str) -> None:
        """A step of the program at hand, which stands before its stack where it ends the process."""
        if self.file is not None:
            self.stacks.write(line + "\n")

    def end(self, name: str, kind: str, **facts: Any) -> None:
        if self.file is not None:
            faulthandler.cancel_dump_traceback_later()
            self.stacks.truncate(self.kept)
        self._write({"name": name, "kind": kind, **facts})

    def _write(self, of: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(of) + "\n")

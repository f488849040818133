"""Small JSON files that outlive a process, in the user's cache folder: what was found out about this machine.

Readers see the old file or the new one, never a part of one. A file that is missing or damaged says nothing, and
nothing that is wrong with one stops a program.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger("fusedhead")


def cache_file(name: str, variable: str) -> Path:
    """``name`` in the user's cache folder of fusedhead, or the path that the environment's ``variable`` gives."""
    given = os.environ.get(variable)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fusedhead" / name


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """What the file holds; {} where it is missing or damaged, which is logged with the ``remedy``."""
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
        problem: Exception | str = f"it holds a {type(found).__name__}"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problem = error
    log.warning("%s cannot be used (%s); %s", path, problem, remedy)
    return {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Put ``content`` in the file's place, atomically. Raises OSError where the folder cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(content, indent=1))
    os.replace(written, path)

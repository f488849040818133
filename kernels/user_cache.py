"""Small JSON files in the user's cache folder, with facts about this machine.

A write is atomic. A missing or damaged file counts as empty and never stops a program.
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
    path = os.environ.get(variable)
    if path:
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fusedhead" / name


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The content of the file; {} where it is missing or damaged. Damage is logged with the ``remedy``."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        problem: Exception | str = f"it holds a {type(content).__name__}"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problem = error
    log.warning("%s cannot be used (%s); %s", path, problem, remedy)
    return {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file by ``content``, atomically. Raises OSError where the folder cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(content, indent=1))
    os.replace(written, path)

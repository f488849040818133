"""A stable hash over every source file of the package.

torch.compile's caches are keyed by the graph and not by the code of its custom ops. Without this hash in the key, an
upgrade that corrects a gradient would keep serving the old one.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SUFFIXES = (".py", ".cpp", ".h", ".cu")
KEY_PACKAGES = ("fusedhead", "fusedhead.lowering", "fusedhead.kernels")


def sources() -> list[tuple[str, Path]]:
    """(name inside the package, file) of every source file, sorted by name."""
    files = {}
    for package in KEY_PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for file in Path(folder).rglob("*"):
                if file.suffix in SUFFIXES and file.is_file():
                    files[f"{package}/{file.relative_to(folder).as_posix()}"] = file
    return sorted(files.items())


@cache
def source_hash() -> bytes:
    """SHA-256 of the names and contents of the package's sources; read once per process, on first use.

    Two installs of the same files have the same hash.
    """
    digest = hashlib.sha256()
    for name, file in sources():
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.digest()

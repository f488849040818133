"""Keeping Dynamo out of this package's frames: they handle tensors that it cannot trace."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from fusedhead.compat import skip_frames_of

NAMESPACES = ("fusedhead", "fusedhead.lowering", "fusedhead.kernels")


def skip_own_frames(traced: str) -> None:
    """Make Dynamo skip every module of the package but its part ``traced``, whose functions users call themselves."""
    for namespace in NAMESPACES:
        for part in pkgutil.iter_modules(import_module(namespace).__path__):
            if part.name != traced:
                skip_frames_of(f"{namespace}.{part.name}")

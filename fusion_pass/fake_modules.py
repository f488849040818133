"""Fake tensors for real ones: for arguments, and for the parameters of the modules that a function holds.

A fake has the sizes of the real tensor and no numbers. It is on the CPU, where every op has a fake kernel.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn


def faked(value: Any, mode: Any) -> Any:
    """A fake tensor of the mode with the same sizes, on the CPU."""
    if not isinstance(value, Tensor):
        return value
    with torch.no_grad(), mode:
        stand_in = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cpu")
    return stand_in.requires_grad_(value.requires_grad) if value.requires_grad else stand_in


def modules_of(things: Any) -> list[nn.Module]:
    """The modules that a function or its arguments hold: itself, those in its closure, globals that it names."""
    modules: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def visit(thing: Any) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            modules[id(thing)] = thing
        elif isinstance(thing, MethodType):
            visit(thing.__self__)
            visit(thing.__func__)
        elif isinstance(thing, FunctionType):
            for cell in thing.__closure__ or ():
                visit(getattr(cell, "cell_contents", None) if cell_filled(cell) else None)
            for name in thing.__code__.co_names:
                visit(thing.__globals__.get(name))
        elif isinstance(thing, (list, tuple)):
            for part in thing:
                visit(part)
        elif isinstance(thing, dict):
            for part in thing.values():
                visit(part)
        elif hasattr(thing, "func") and hasattr(thing, "args"):  # functools.partial
            visit((thing.func, thing.args, getattr(thing, "keywords", {})))

    visit(things)
    return list(modules.values())


def cell_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


@contextmanager
def fake_modules(modules: list[nn.Module], mode: Any) -> Iterator[None]:
    """Context in which the modules have fake parameters and buffers. Tied ones stay tied."""
    fakes: dict[int, Any] = {}
    places: list[tuple[dict[str, Any], str, Any]] = []
    for part in {id(part): part for module in modules for part in module.modules()}.values():
        for table in (part._parameters, part._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                places.append((table, name, value))
                if id(value) not in fakes:
                    fake = faked(value.detach(), mode)
                    fakes[id(value)] = (
                        nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake
                    )
    try:
        for table, name, value in places:
            table[name] = fakes[id(value)]
        yield
    finally:
        for table, name, value in places:
            table[name] = value
        fakes.clear()
        gc.collect()  # compiled code holds references to them

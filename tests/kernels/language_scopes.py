"""Triton's interpreter without work that has no result: a third of the time, the same numbers.

* What `triton.language` defines is replaced when a kernel is launched, and again for each call of a device function,
  which finds nothing left to replace. Here a call replaces only what a module defines that the launch has not met.
* What there is to replace is looked up in the modules once, instead of at each launch.
* Sums and products of integers are made in 64 bits too, for an assertion that is not made unless Triton debugs.
* The dtype of numpy that stands for one of Triton is looked up in a table that is made for each look.

A Triton that does it some other way is left as it is.
"""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from functools import cache
from inspect import getmembers, ismodule
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

NAMES = [
    "_patch_lang",
    "_patch_builtin",
    "_patch_attr",
    "_LangPatchScope",
    "_get_np_dtype",
    "interpreter_builder",
    "tl",
]


def quicken() -> None:
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in NAMES) or interpreter._patch_lang.__module__ == __name__:
        return
    interpreter._patch_builtin = _patching(_builtins_of(interpreter.tl), interpreter._patch_attr)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang, interpreter.tl)
    interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype, interpreter.tl)
    options = getattr(interpreter.interpreter_builder, "options", None)
    if is_dataclass(options) and getattr(options, "debug", True) is False:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def _builtins_of(tl: ModuleType) -> Any:
    """The functions of Triton's language that are defined in a module or a class, before any has been replaced."""
    packages = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    results = {id(p): [(name, x) for name, x in getmembers(p) if tl.core.is_builtin(x)] for p in packages}
    return lambda package: results.get(id(package)) or [x for x in getmembers(package) if tl.core.is_builtin(x[1])]


def _remembering(dtype_of: Any, tl: ModuleType) -> Any:
    results: dict[str, Any] = {}  # by the name of a scalar type; blocks and pointers have no hash

    def dtype_of_numpy(type_: Any) -> Any:
        scalar = type_.element_ty if isinstance(type_, tl.block_type) else type_
        if isinstance(scalar, tl.pointer_type):
            return dtype_of(type_)
        if scalar.name not in results:
            results[scalar.name] = dtype_of(scalar)
        return results[scalar.name]

    return dtype_of_numpy


def _patching(builtins_of: Any, patch_attr: Any) -> Any:
    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins_of(package):
            patch_attr(package, name, member, builder, scope)

    return patch


def _once_a_launch(patch_lang: Any, tl: ModuleType) -> Any:
    patched: set[str] = set()  # the modules, while a kernel runs
    scopes: list[Any] = []  # what put them back; Triton leaves those of device functions as they are
    nothing = SimpleNamespace(restore=lambda: None)

    @cache
    def met(fn: FunctionType) -> frozenset[str]:
        return frozenset(x.__name__ for x in fn.__globals__.values() if ismodule(x) and x in (tl, tl.core))

    def restore() -> None:
        patched.clear()
        while scopes:
            scopes.pop().restore()

    def patch(fn: FunctionType) -> Any:
        runs = bool(scopes)
        if not runs or not met(fn) <= patched:
            patched.update(met(fn))
            scopes.append(patch_lang(fn))
        return nothing if runs else SimpleNamespace(restore=restore)

    return patch

"""Triton's interpreter, whose device functions run in the language that their kernel's launch has patched.

The interpreter replaces what `triton.language` defines when a kernel is launched, and again for each call of a device
function, which finds nothing left to replace: a third of the time that a kernel takes. Here only a module that the
launch has not met is patched at a call. The numbers are the same.
"""

from __future__ import annotations

from inspect import ismodule
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any


def patch_a_launch_once() -> None:
    """A Triton that patches its language some other way is left as it is."""
    from triton.runtime import interpreter

    names = ("_patch_lang", "_LangPatchScope", "tl", "GridExecutor", "InterpretedFunction")
    if all(hasattr(interpreter, name) for name in names) and interpreter._patch_lang.__module__ != __name__:
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang, interpreter.tl)


def _once_a_launch(patch_lang: Any, tl: ModuleType) -> Any:
    running: list[set[str]] = []  # the modules that are patched, while a kernel runs
    nothing = SimpleNamespace(restore=lambda: None)

    def patch(fn: FunctionType) -> Any:
        met = {x.__name__ for x in fn.__globals__.values() if ismodule(x) and x in (tl, tl.core)}
        if running:
            if met <= running[0]:
                return nothing
            running[0] |= met
            return patch_lang(fn)  # a device function's, which nobody restores
        scope = patch_lang(fn)
        restore = scope.restore

        def restore_and_forget() -> None:
            running.clear()
            restore()

        scope.restore = restore_and_forget
        running.append(met)
        return scope

    return patch

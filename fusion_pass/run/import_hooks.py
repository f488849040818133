"""Import hooks: `after_import` runs an action once a module has been imported, without importing it.

For an imported module the action runs at once. For others a finder is first in ``sys.meta_path`` as long as an action
waits: it lets the other finders find the module and runs the action after the module's code. An action that raises does
not make the import fail.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger("fusedhead")

Action = Callable[[ModuleType], None]
_guard = threading.RLock()


class Waiting(MetaPathFinder):
    """The finder, which finds no module itself."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                self.attend(spec)
                return spec
        return None

    def attend(self, spec: ModuleSpec) -> None:
        """Make the loader run the actions after the module. The module keeps its own loader."""
        loader: Any = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            execute(module)
            self.imported(module, spec.name)

        try:
            loader.exec_module = exec_module
        except AttributeError:  # a loader without attributes cannot be patched
            log.debug("fusedhead: cannot attend the import of %s", spec.name)

    def imported(self, module: ModuleType, name: str) -> None:
        with _guard:
            actions = self.actions.pop(name, [])
            self.stand_or_leave()
        for action in actions:
            act(action, module, name)

    def stand_or_leave(self) -> None:
        if self.actions and self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        elif not self.actions and self in sys.meta_path:
            sys.meta_path.remove(self)


waiting = Waiting()


def act(action: Action, module: ModuleType, name: str) -> None:
    try:
        action(module)
    except Exception:
        log.exception("fusedhead: what was to be done after the import of %s failed", name)


def after_import(name: str, action: Action) -> Callable[[], None]:
    """Run ``action(module)`` now if the module ``name`` is imported, else right after it has been.

    Returns the function that cancels the action. After the action has run it does nothing.
    """
    with _guard:
        module = sys.modules.get(name)
        executing = getattr(getattr(module, "__spec__", None), "_initializing", False)
        if module is None or executing:
            waiting.actions.setdefault(name, []).append(action)
            waiting.stand_or_leave()
    if module is not None and not executing:
        act(action, module, name)

    def stop() -> None:
        with _guard:
            if action in waiting.actions.get(name, ()):
                waiting.actions[name].remove(action)
                if not waiting.actions[name]:
                    del waiting.actions[name]
                waiting.stand_or_leave()

    return stop

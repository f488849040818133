"""``fusedhead.enable()``: every graph that this process gives to Inductor goes through fusedhead first.

For programs that name no backend, or "inductor", or cannot name another. Every patch of other packages is a row of
`EDITS`: where, why, and a function that makes it and returns the function that undoes it. `changes` lists the patches
in force. No package is imported for a patch: those of packages that are not imported yet wait for the import.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from typing_extensions import Unpack

from fusedhead.backend import compile_graph, compile_with
from fusedhead.compat import unusable
from fusedhead.eager.heads import everywhere, project_eagerly
from fusedhead.eager.tied_heads import watch_tables
from fusedhead.functional.eager_linear import tied_forward_with
from fusedhead.inductor.config import Inductor, keyed
from fusedhead.options import OptionValues, set_process_wide, split_options
from fusedhead.run.import_hooks import after_import

log = logging.getLogger("fusedhead")

Undo = Callable[[], None]


def through_fusedhead(module: ModuleType) -> Undo:
    """Send the graphs that ``torch.compile`` gives to Inductor through the pass, then to Inductor with the same
    settings.

    ``torch.compile`` makes an object of this class, whether Inductor was named or is the default, and calls it for
    every graph. The patch therefore reaches functions that were decorated before it and have not run yet.
    """
    cls = torch._TorchCompileInductorWrapper
    original = cls.__call__

    def compile_for_inductor(self: Any, model_: Any, inputs_: Any, **kwargs: Any) -> Any:
        # ahead-of-time Inductor and the backend's own calls are left alone, and so is everything after `disable`
        if type(self) is not cls or not in_force or unusable():
            return original(self, model_, inputs_, **kwargs)
        inductor = copy.copy(self)
        inductor.__class__ = Inductor
        inductor.config = keyed(self.config)
        settings, _ = split_options(None)

        def compiler(gm: Any, inputs: Any) -> Any:
            return inductor(gm, inputs, **kwargs)

        compiler.config = inductor.config  # type: ignore[attr-defined]
        return compile_graph(model_, inputs_, settings, compiler)

    return replace_attribute(cls, "__call__", compile_for_inductor)


def by_name(module: ModuleType) -> Undo:
    """Patch the look-up of the backend by name: ``torch._dynamo.optimize("inductor")``."""
    backends = torch._dynamo.backends.registry._COMPILER_FNS
    original = backends["inductor"]

    def inductor(gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
        return original(gm, example_inputs, **kwargs) if kwargs else compile_with(gm, example_inputs)

    vars(inductor).update(vars(original))  # older registries keep a backend's attributes on the function
    backends["inductor"] = inductor

    def undo() -> None:
        if backends["inductor"] is inductor:
            backends["inductor"] = original

    return undo


def accelerate_accepts_the_name(module: ModuleType) -> Undo:
    """``DynamoBackend("FUSEDHEAD")``: accelerate checks the names of backends against an enumeration."""
    enumeration = module.DynamoBackend
    before = vars(enumeration).get("_missing_")
    inherited = enumeration._missing_  # an earlier patch by another package is still called

    member = str.__new__(enumeration, "FUSEDHEAD")
    member._name_ = member._value_ = "FUSEDHEAD"

    def missing(cls: Any, value: Any) -> Any:
        return member if value == "FUSEDHEAD" else inherited(value)

    enumeration._missing_ = classmethod(missing)

    def undo() -> None:
        if before is not None:
            enumeration._missing_ = before
        else:
            del enumeration._missing_

    return undo


class Method(str):
    """A logger's method among those that Dynamo skips. It is text, since torch 2.11 sorts these and writes them as
    JSON.
    """

    method: Callable[..., Any]

    def __new__(cls, method: Callable[..., Any]) -> Method:
        self = super().__new__(cls, method.__name__)
        self.method = method
        return self

    def __eq__(self, other: object) -> bool:
        return (other.method if isinstance(other, Method) else other) == self.method

    def __hash__(self) -> int:
        return hash(self.method)

    def __reduce__(self) -> Any:
        return Method, (self.method,)


def transformers_warns_without_a_break(module: ModuleType) -> Undo:
    """Trace past ``logger.warning_once``, which otherwise ends the graph between the head and the loss.

    The warning is not printed when a compiled graph reaches it first.
    """
    ignored = torch._dynamo.config.ignore_logger_methods
    methods = [getattr(logging.Logger, name, None) for name in ("warning_once", "info_once")]
    added = [Method(method) for method in methods if method is not None and method not in ignored]
    ignored.update(added)  # type: ignore[arg-type]
    return lambda: ignored.difference_update(added)


def heads_in_eager_mode(module: ModuleType) -> Undo:
    """Let projections in eager mode return deferred logits, so that a loss on them is fused."""
    undo, forget = everywhere(), watch_tables()

    def undo_both() -> None:
        undo()
        forget()

    return undo_both


def torchtune_ties_heads(module: ModuleType) -> Undo:
    """The same for torchtune's heads that are tied to an embedding: a layer of another class, given the weight."""
    original = module.Linear.forward
    if list(inspect.signature(original).parameters) != ["self", "x", "weight"]:
        raise RuntimeError("torchtune.modules.tied_linear.Linear.forward takes other arguments")
    return replace_attribute(module.Linear, "forward", tied_forward_with(project_eagerly, original))


def replace_attribute(owner: Any, name: str, value: Any) -> Undo:
    """Set an attribute. Undoing keeps a value that another package has set since."""
    original = vars(owner)[name]
    setattr(owner, name, value)

    def undo() -> None:
        if vars(owner)[name] is value:
            setattr(owner, name, original)

    return undo


@dataclass(frozen=True)
class Edit:
    """One patch of another package."""

    where: str  # the patched name
    module: str  # the module that must be imported before
    why: str
    make: Callable[[ModuleType], Undo]


EDITS = (
    Edit(
        "torch._TorchCompileInductorWrapper.__call__",
        "torch",
        "torch.compile with no backend, or with backend='inductor', goes through fusedhead",
        through_fusedhead,
    ),
    Edit(
        "torch._dynamo.backends.registry._COMPILER_FNS['inductor']",
        "torch._dynamo.backends.inductor",
        "torch._dynamo.optimize('inductor') goes through fusedhead",
        by_name,
    ),
    Edit(
        "accelerate.utils.dataclasses.DynamoBackend._missing_",
        "accelerate.utils.dataclasses",
        "accelerate, and with it transformers' Trainer, accepts the backend's name 'fusedhead'",
        accelerate_accepts_the_name,
    ),
    Edit(
        "torch._dynamo.config.ignore_logger_methods",
        "transformers.utils.logging",
        "a logger.warning_once between a head and its loss does not split the graph",
        transformers_warns_without_a_break,
    ),
    Edit(
        "torch.nn.Linear.forward",
        "torch",
        "heads that are not compiled hand out deferred logits, and a loss of them is fused",
        heads_in_eager_mode,
    ),
    Edit(
        "torchtune.modules.tied_linear.Linear.forward",
        "torchtune.modules.tied_linear",
        "so do torchtune's heads that are tied to an embedding",
        torchtune_ties_heads,
    ),
)


@dataclass
class Change:
    """The state of an edit: ``state`` is "made", "waiting for the import of ..." or "failed: ..."."""

    where: str
    why: str
    state: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why} ({self.state})"


_guard = threading.RLock()
in_force: dict[str, tuple[Change, list[Undo]]] = {}


def enable(**options: Unpack[OptionValues]) -> None:
    """Put fusedhead in front of Inductor in this process, for every thread, until `disable`.

    ``options`` are those of the backend without their prefix (`OptionValues`) and become the defaults of every
    compilation. A second call replaces the options only. Functions that are compiled already stay;
    ``torch.compiler.reset()`` forgets them.

    Raises ValueError for an unknown option or a bad value and then patches nothing.
    """
    with _guard:
        set_process_wide(options)
        for edit in EDITS:
            if edit.where not in in_force:
                start_edit(edit)


def start_edit(edit: Edit) -> None:
    change = Change(edit.where, edit.why, f"waiting for the import of {edit.module}")
    undo: list[Undo] = []
    in_force[edit.where] = (change, undo)

    def make(module: ModuleType) -> None:
        with _guard:
            if in_force.get(edit.where, (None,))[0] is not change:
                return  # `disable` was called during the import
            try:
                undo.append(edit.make(module))
                change.state = "made"
            except Exception as error:  # this version of the package lacks the name and does not need the patch
                change.state = f"failed: {type(error).__name__}: {error}"
                log.warning("fusedhead: %s could not be changed (%s: %s)", edit.where, type(error).__name__, error)

    stop = after_import(edit.module, make)
    undo.append(stop)


def disable() -> None:
    """Undo `enable`, including its options. Does nothing if it was not called."""
    with _guard:
        set_process_wide({})
        for _, undo in reversed(in_force.values()):
            for step in undo:
                step()
        in_force.clear()


def changes() -> list[Change]:
    """The patches that `enable` has made in other packages, and those that wait for an import."""
    with _guard:
        return [copy.copy(change) for change, _ in in_force.values()]

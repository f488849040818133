"""The surroundings of a call on deferred logits (modes, hooks, transforms), and when they require a call op by op.

Eager code would have computed the logits where the model returned them. Modes, hooks on saved tensors and function
transforms that are active only where they are first read must not see that computation, so `out_of_sight` hides it.
Where such a surrounding observes single ops, a call is made op by op on the plain tensor.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from fusedhead.compat import (
    DispatchKey,
    clear_function_transforms,
    disable_current_modes,
    disable_torch_function_subclass,
    dispatch_modes,
    excluded_dispatch_keys,
    force_dispatch_keys,
    function_transform_level,
    included_dispatch_keys,
    top_saved_tensors_hooks,
)
from fusedhead.graph.saved_tensor_hooks import unhooked


@contextmanager
def out_of_sight(hooks_see: bool = False) -> Iterator[None]:
    """Context that hides a computation from active modes, hooks on saved tensors and function transforms.

    ``hooks_see``: hooks on saved tensors do see what autograd saves of it.
    """
    with (
        disable_torch_function_subclass(),
        clear_function_transforms(),
        disable_current_modes(),
        nullcontext() if hooks_see else unhooked(),
    ):
        yield


def below_autograd() -> bool:
    return not torch.is_inference_mode_enabled() and excluded_dispatch_keys().has(DispatchKey.AutogradFunctionality)


@contextmanager
def above_autograd() -> Iterator[None]:
    """Context in which ops are recorded by autograd, for a caller below it in the dispatcher: a mode or a kernel.

    `torch.overrides.enable_reentrant_dispatch` only restores the dispatch keys of the innermost such caller. Where one
    calls another, these are below autograd too.
    """
    if not below_autograd():
        yield
        return
    with torch.overrides.enable_reentrant_dispatch(), force_dispatch_keys(*_keys_of_a_new_thread()):
        yield


@cache
def _keys_of_a_new_thread() -> tuple[Any, Any]:
    """The dispatch keys included and excluded on a new thread, where no mode or transform is active."""
    keys: list[tuple[Any, Any]] = []
    thread = threading.Thread(target=lambda: keys.append((included_dispatch_keys(), excluded_dispatch_keys())))
    thread.start()
    thread.join()
    return keys[0]


@contextmanager
def trial() -> Iterator[None]:
    """Context for trying a call on fake tensors, hidden from modes and hooks. Torch's log of a failure is suppressed.

    The program's own call comes later and raises or logs what it should.
    """
    _trials.under_way = getattr(_trials, "under_way", 0) + 1
    try:
        with out_of_sight():
            yield
    finally:
        _trials.under_way -= 1


_trials = threading.local()


def _no_trial(record: logging.LogRecord) -> bool:
    return not getattr(_trials, "under_way", 0)


logging.getLogger("torch._subclasses.fake_tensor").addFilter(_no_trial)


def checkpoint() -> object | None:
    """The innermost region of non-reentrant activation checkpointing, one object for each pass over a region.

    Such a region runs twice, and has to save the same tensors both times.
    """
    hooks = top_saved_tensors_hooks(True)
    if hooks is None or getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint":
        return None
    return hooks[0]


def op_by_op() -> bool:
    """Whether something active interprets single ops: a function transform, a fake tensor mode, a tracer.

    A mode that passes an op on below autograd counts too, since results have no history there.
    """
    if function_transform_level() is not None or below_autograd():
        return True
    return any(mode.is_infra_mode() for mode in dispatch_modes())

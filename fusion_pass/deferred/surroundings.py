"""The surroundings of a call on deferred logits (modes, hooks, transforms), and when they require a call op by op.

The tensor was made where the model returned it. What is active where it is first read (modes that see every op, hooks
on saved tensors, functorch's levels) has not seen it being made, so `out_of_sight` hides its making from them; and
where such a surrounding gives the ops themselves a meaning, calls are made op by op on the numbers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
def out_of_sight() -> Iterator[None]:
    """Context for computation of another time, hidden from modes, hooks on saved tensors and function transforms."""
    with (
        disable_torch_function_subclass(),
        clear_function_transforms(),
        disable_current_modes(),
        unhooked(),
    ):
        yield


def below_autograd() -> bool:
    return not torch.is_inference_mode_enabled() and excluded_dispatch_keys().has(DispatchKey.AutogradFunctionality)


@contextmanager
def above_autograd() -> Iterator[None]:
    """Run ops with a history, though autograd has passed the caller already: a mode or a kernel below it.

    `torch.overrides.enable_reentrant_dispatch` goes back to where the innermost of these was entered, which is below
    autograd too where one calls another.
    """
    if not below_autograd():
        yield
        return
    with torch.overrides.enable_reentrant_dispatch(), force_dispatch_keys(*_keys_of_a_new_thread()):
        yield


@cache
def _keys_of_a_new_thread() -> tuple[Any, Any]:
    """The dispatch keys included and excluded where nothing surrounds a call."""
    keys: list[tuple[Any, Any]] = []
    thread = threading.Thread(target=lambda: keys.append((included_dispatch_keys(), excluded_dispatch_keys())))
    thread.start()
    thread.join()
    return keys[0]


@contextmanager
def trial() -> Iterator[None]:
    """Run calls on stand-ins, unseen, to find out whether they can be: what torch logs of those that cannot is kept.

    The program's own call comes later, and says what there is to say.
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
    """The region of non-reentrant activation checkpointing that surrounds this, one object a region and pass over it.

    Such a region is run twice, and has to save the same tensors both times.
    """
    hooks = top_saved_tensors_hooks(True)
    if hooks is None or getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint":
        return None
    return hooks[0]


def op_by_op() -> bool:
    """Whether something active gives single ops a meaning of its own: a function transform, stand-ins, a tracer.

    So does a caller that autograd has passed already, whose results have no history: a mode that hands an op on.
    """
    if function_transform_level() is not None or below_autograd():
        return True
    return any(mode.is_infra_mode() for mode in dispatch_modes())

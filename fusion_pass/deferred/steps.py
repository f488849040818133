"""How often an optimizer has stepped what a tensor's memory holds.

Fused optimizers write weights without a trace: neither version nor address of a parameter changes. But every
`torch.optim.Optimizer`, also one of another package, calls a hook after its step. What is written through ``.data`` by
other code leaves no trace at all. This file must not know who asks.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

_lock = threading.Lock()
_steps = WeakTensorKeyDictionary()  # of the tensors that somebody asked for
_hooked: list[Any] = []  # the handle of the hook, once somebody has asked


def steps(tensor: Tensor) -> int:
    """Optimizer steps on this tensor's memory, counted from the first time that it is asked for."""
    with _lock:
        if not _hooked:
            _hooked.append(register_optimizer_step_post_hook(_stepped))
        return _steps.setdefault(tensor, 0)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling() or not _steps:  # a compiled step counts up the versions of what it writes
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = set(map(id, parameters))
    with _lock:
        known = list(_steps.keys())
        others = [tensor for tensor in known if id(tensor) not in own]
        memory = {_memory(p) for p in parameters} if others else set()
        for tensor in known:
            if id(tensor) in own or _memory(tensor) in memory:
                _steps[tensor] += 1


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

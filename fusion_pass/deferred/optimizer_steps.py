"""Counts the optimizer steps that wrote a tensor's memory without changing its version.

Fused optimizers write weights and change neither version nor address of a parameter. Every
`torch.optim.Optimizer`, also one of another package, calls a hook before and after its step:

| who steps                     | what counts as written                                                     |
|-------------------------------|----------------------------------------------------------------------------|
| torch's own, not fused        | nothing here: it counts up the versions of what it writes                  |
| torch's own, fused            | what has a gradient; where ``found_inf`` is given, if that was zero        |
| any other, with a gradient    | what it steps                                                              |
| any other, without a gradient | what has other sums of rows and columns after the step than before         |

Writes of other code through ``.data`` are not counted.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary


class Steps(NamedTuple):
    """Steps on a tensor's memory, counted from the first query on."""

    certain: int = 0
    # the number of fused steps that wrote, on the device: read only where the answer depends on it
    perhaps: Tensor | None = None

    def since(self, before: Steps) -> str | None:
        """ "certain", "perhaps", or None: whether there were steps after ``before``."""
        if self.certain != before.certain:
            return "certain"
        return None if self.perhaps is before.perhaps else "perhaps"

    def written_since(self, before: Steps) -> bool:
        """Whether a step wrote after ``before``; waits for the device where only that can say."""
        certainty = self.since(before)
        if certainty != "perhaps":
            return certainty == "certain"
        earlier = 0 if before.perhaps is None else before.perhaps.item()
        return self.perhaps.item() != earlier


NO_STEPS = Steps()
_lock = threading.Lock()
_steps = WeakTensorKeyDictionary()  # the steps on each tensor that `steps` was called for
_hooked: list[Any] = []  # the handles of the hooks, empty before the first call of `steps`
_under_way = threading.local()  # the step that is under way on this thread


def steps(tensor: Tensor) -> Steps:
    """Optimizer steps on this tensor's memory."""
    with _lock:
        if not _hooked:
            _hooked.append(register_optimizer_step_pre_hook(_steps_begin))
            _hooked.append(register_optimizer_step_post_hook(_stepped))
        return _steps.setdefault(tensor, NO_STEPS)


class _Begun(NamedTuple):
    """The state that the hook before a step records for the hook after it."""

    optimizer: Optimizer
    graded: frozenset[int]  # ids of the parameters that have a gradient, or get one in the step's closure
    sums: list[tuple[Tensor, list[Tensor]]]  # of tensors in question, whose writes nothing else would show


def _steps_begin(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if torch.compiler.is_compiling() or not _steps:
        return
    closure = any(callable(value) for value in (*args[1:], *kwargs.values()))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    graded = {id(p) for p in parameters if closure or p.grad is not None}
    ungraded = [] if _is_torchs(type(optimizer)) else [p for p in parameters if id(p) not in graded]
    _under_way.step = _Begun(optimizer, frozenset(graded), [(t, _sums(t)) for t in _known_among(ungraded)])


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling() or not _steps:  # a compiled step counts up the versions of what it writes
        return
    begun, _under_way.step = getattr(_under_way, "step", None), None
    if begun is None or begun.optimizer is not optimizer:  # another one's step within this one
        begun = _Begun(optimizer, frozenset(id(p) for group in optimizer.param_groups for p in group["params"]), [])
    traced = _is_torchs(type(optimizer))
    written = [
        p for group in optimizer.param_groups if not traced or group.get("fused") for p in group["params"]
        if id(p) in begun.graded or p.grad is not None
    ]  # fmt: skip
    found_inf = getattr(optimizer, "found_inf", None) if traced else None
    with torch.no_grad():
        for tensor in _known_among(written):
            _count(tensor, None if found_inf is None else found_inf == 0)
        for tensor, before in begun.sums:
            _count(tensor, torch.stack([(x != y).any() for x, y in zip(before, _sums(tensor))]).any())


def _count(tensor: Tensor, wrote: Tensor | None) -> None:
    with _lock:
        count = _steps.get(tensor, NO_STEPS)
        if wrote is None:
            _steps[tensor] = count._replace(certain=count.certain + 1)
        else:
            number = wrote.detach().reshape(()).to(torch.int64)
            _steps[tensor] = count._replace(perhaps=number if count.perhaps is None else count.perhaps + number)


def _known_among(parameters: list[Tensor]) -> list[Tensor]:
    """The tensors in `_steps` that lie in the memory of the parameters."""
    ids = set(map(id, parameters))
    with _lock:
        tensors = list(_steps.keys())
    memory = {_memory(p) for p in parameters} if any(id(tensor) not in ids for tensor in tensors) else set()
    return [tensor for tensor in tensors if id(tensor) in ids or _memory(tensor) in memory]


def _sums(tensor: Tensor) -> list[Tensor]:
    """Sums of the tensor's bits along each dimension: they differ after all but a contrived write."""
    with torch.no_grad():
        bits = tensor.detach().view(_WORDS[tensor.itemsize])
        return [bits.sum(d, dtype=torch.int64) for d in range(bits.ndim)] or [bits]


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _is_torchs(kind: Any) -> bool:
    """Whether the step of an optimizer's class is torch's own code."""
    step = inspect.unwrap(kind.step)
    return getattr(step, "__globals__", {}).get("__name__", "").startswith("torch.optim.")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

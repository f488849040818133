"""Writes to a part of deferred logits, ``z[:, k] += c`` and ``z[mask] = c``, become new deferred logits.

Python runs an augmented assignment in three calls: it reads the part, writes to it, and assigns it to itself. The write
rebinds both the part and the whole to new values, and the assignment does nothing. This applies only where no other
deferred tensor depends on the whole; any other write is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedhead.deferred.call_program import decode
from fusedhead.deferred.tensor import DeferredLogits
from fusedhead.graph.nodes import every_dimension

# name of a write to a part -> what is done to the whole, with which number elsewhere, the sign of the operand
UPDATES: dict[str, tuple[Callable[..., Tensor], float, int]] = {
    "__iadd__": (Tensor.add, 0.0, 1), "add_": (Tensor.add, 0.0, 1),
    "__isub__": (Tensor.add, 0.0, -1), "sub_": (Tensor.add, 0.0, -1),
    "__imul__": (Tensor.mul, 1.0, 1), "mul_": (Tensor.mul, 1.0, 1),
}  # fmt: skip
Call = tuple[Callable[..., Any], tuple]  # a function and its arguments


def part_of(part: Any) -> tuple[DeferredLogits, Any] | None:
    """(whole, index) where deferred logits are ``whole[index]`` along one dimension and not computed yet."""
    if not isinstance(part, DeferredLogits) or part._plain is not None:
        return None
    recorded = part._deferred.recorded
    if recorded.func is not Tensor.__getitem__ or len(recorded.tensors) != 1:
        return None
    whole, index = decode(recorded.args, lambda leaf: recorded.tensors[leaf.at])
    one_dim = isinstance(whole, DeferredLogits) and restricted_dim(index, whole.ndim) is not None
    return (whole, index) if one_dim else None


def restricted_dim(index: Any, ndim: int) -> tuple[int, Any] | None:
    """The one dimension that an index restricts, with its integer or slice."""
    if any(isinstance(entry, Tensor) for entry in (index if isinstance(index, tuple) else (index,))):
        return None
    parts = every_dimension(index, ndim)
    at = [(d, part) for d, part in enumerate(parts) if part != slice(None)]
    return at[0] if len(parts) == ndim and len(at) == 1 and isinstance(at[0][1], (int, slice)) else None


def update(name: str, whole: DeferredLogits, index: Any, operands: tuple, kwargs: dict[str, Any]) -> Call | None:
    """The value of the whole after a write to its part: a function and its arguments after the whole."""
    if name not in UPDATES or len(operands) != 1 or kwargs or not isinstance(operands[0], (int, float, Tensor)):
        return None
    (operand,), (function, neutral, sign) = operands, UPDATES[name]
    if isinstance(operand, (bool, DeferredLogits)):
        return None
    if isinstance(operand, Tensor) and (operand.ndim or (operand.requires_grad and not whole.requires_grad)):
        return None
    (dim, entry), wide = restricted_dim(index, whole.ndim), torch.promote_types(whole.dtype, torch.float32)  # type: ignore[misc]
    vector = torch.full((whole.shape[dim],), neutral, dtype=wide, device=whole.device)
    vector[entry] = operand if sign == 1 else -operand
    return function, (vector.view(-1, *[1] * (whole.ndim - 1 - dim)),)


def assignment(whole: DeferredLogits, index: Any, number: Any) -> Call | None:
    """The value of the whole after ``whole[index] = number``: of classes, of tokens, or of a class of some tokens."""
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return None
    entries = index if isinstance(index, tuple) else (index,)
    mask = entries[0] if entries and isinstance(entries[0], Tensor) else None
    if mask is None:
        at = restricted_dim(index, whole.ndim)
        if at is None:
            return None
        columns = torch.zeros(whole.shape[at[0]], dtype=torch.bool, device=whole.device)
        columns[at[1]] = True
        return Tensor.masked_fill, (columns.view(-1, *[1] * (whole.ndim - 1 - at[0])), number)
    if isinstance(mask, DeferredLogits) or mask.dtype != torch.bool or mask.shape != whole.shape[:-1]:
        return None
    if len(entries) == 1:
        return Tensor.masked_fill, (mask.unsqueeze(-1), number)
    classes = entries[1] if len(entries) == 2 else None
    if not isinstance(classes, Tensor) or isinstance(classes, DeferredLogits) or classes.dtype != torch.int64:
        return None
    return of_some_tokens, (mask, classes, number)


def of_some_tokens(whole: Tensor, mask: Tensor, classes: Tensor, number: float) -> Tensor:
    """``whole`` after ``whole[mask, classes] = number``; the other tokens get the number of a class that they have."""
    at = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    at[mask] = torch.where(classes < 0, classes + whole.shape[-1], classes)
    column = at.unsqueeze(-1)
    return whole.scatter(-1, column, torch.where(mask.unsqueeze(-1), number, whole.gather(-1, column)))


def same_index(a: Any, b: Any, ndim: int) -> bool:
    """Whether two indices along one dimension each are the same."""
    return restricted_dim(a, ndim) is not None and restricted_dim(a, ndim) == restricted_dim(b, ndim)

"""What happens to a call on deferred logits: recorded, answered by a fused op, or made on the plain tensor.

Steps that a loss takes are recorded. Anything else is read (`deferred_reading`): an answer from row statistics is
computed by the fused ops, and what no rule can read is computed from the plain tensor, as is every write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fusedhead import deferred_tables as tables
from fusedhead.deferred_outcome import Unread
from fusedhead.deferred_picks import picks
from fusedhead.deferred_program import Leaf, Mode, Unreadable, encode
from fusedhead.deferred_request import NotRecorded, Request
from fusedhead.deferred_tensor import DeferredLogits, Family, Recorded, is_adopted, plain


def call(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Any torch function with deferred logits among its arguments."""
    if func is Tensor.__iter__:
        return iter(args[0].unbind(0))
    if tables.writes(func, args, kwargs):
        return write(func, args, kwargs)
    if func is Tensor.__getitem__:
        rows = masked(*args)
        if rows is not None:
            return rows
    found: list[Tensor] = []

    def local(tensor: Tensor) -> Leaf:
        for at, known in enumerate(found):
            if known is tensor:
                return Leaf(at)
        found.append(tensor)
        return Leaf(len(found) - 1)

    try:
        code = encode(args, local), encode(kwargs, local)
    except Unreadable:
        return compute(func, args, kwargs)
    tensors = [resolved(t) for t in found]
    subjects = [t for t in tensors if isinstance(t, DeferredLogits)]
    origins = {id(t._known.origin) for t in subjects}
    if len(origins) != 1 or not all(map(readable, tensors)):
        return compute(func, args, kwargs)
    lazy = tables.lazy(func)
    if lazy:
        most = max(t.numel() // t.shape[-1] if t.ndim and t.shape[-1] else 0 for t in subjects)
        if any(t.numel() > most and t.ndim > 1 for t in tensors if not isinstance(t, DeferredLogits)):
            lazy = False
        # an operand may be written to before the call is made; none is larger than a row of labels
        tensors = [t if isinstance(t, DeferredLogits) else t.clone() for t in tensors] if lazy else tensors
    request = Request(Recorded(func, *code, tuple(tensors), Mode.now(subjects[0].device.type)))
    try:
        if lazy and isinstance(args[0], DeferredLogits):
            shape, exact = args[0]._known.layout.shape, request.origin.exact
            chosen = picks(func.__name__, shape, args[1:], kwargs)
            if chosen is not None and not any(shape[pick.dim] in exact for each in chosen for pick in each):
                return request.pick(chosen)
        if lazy:
            return request.record()
        outcome = request.outcome()
        return compute(func, args, kwargs) if isinstance(outcome, Unread) else request.answered(outcome)
    except NotRecorded:
        return compute(func, args, kwargs)


def resolved(tensor: Tensor) -> Tensor:
    """Deferred logits that exist by now, or whose gradient is another's business, as the plain tensor."""
    if not isinstance(tensor, DeferredLogits) or (tensor._plain is None and not is_adopted(tensor)):
        return tensor
    return plain(tensor)


def readable(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter, DeferredLogits) and tensor.layout is torch.strided


def masked(tensor: Any, which: Any) -> Tensor | None:
    """``tensor[mask]`` with a boolean mask over leading dimensions, as a choice of rows by number."""
    mask, *rest = which if isinstance(which, tuple) else (which,)
    if type(mask) is not Tensor or mask.dtype is not torch.bool or not isinstance(tensor, DeferredLogits):
        return None
    if any(not (r is Ellipsis or (type(r) is slice and r == slice(None))) for r in rest):
        return None
    if not 0 < mask.ndim < tensor.ndim or mask.shape != tensor.shape[: mask.ndim]:
        return None
    rows = tensor if mask.ndim == 1 else tensor.flatten(0, mask.ndim - 1)
    return rows.index_select(0, mask.reshape(-1).nonzero().squeeze(1).to(tensor.device))


def compute(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The call on plain tensors. A result that is one of them is handed back as the tensor it stands for."""
    stands_for: dict[int, DeferredLogits] = {}

    def exist(tensor: DeferredLogits) -> Tensor:
        stands_for[id(plain(tensor))] = tensor
        return plain(tensor)

    plain_args, plain_kwargs = mapped(exist, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    return stands_for.get(id(result), result) if isinstance(result, Tensor) else result


def mapped(function: Callable[[DeferredLogits], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to deferred logits in it, slices included."""
    if isinstance(value, DeferredLogits):
        return function(value)
    if type(value) is slice:
        return slice(*(mapped(function, v) for v in (value.start, value.stop, value.step)))
    if type(value) in (list, tuple):
        return type(value)(mapped(function, v) for v in value)
    if type(value) is dict:
        return {k: mapped(function, v) for k, v in value.items()}
    return tree_map_only(DeferredLogits, function, value)


def write(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A call that may write to deferred logits: first, everything made of the same logits has to exist."""
    families: list[Family] = []
    mapped(lambda t: families.append(t._known.family), (args, kwargs))
    for family in families:
        for member in list(family.members):
            tensor = member()
            if tensor is not None:
                plain(tensor)
    return compute(func, args, kwargs)


DeferredLogits.handler = staticmethod(call)

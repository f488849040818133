"""Dispatch of a call on deferred logits: it is recorded, answered by a fused op, or computed on the plain tensor.

Steps on the way to a loss are recorded. Other calls are read (`deferred.lower`): those that row statistics answer run
the fused ops, and calls that no rule reads run on the plain tensor, as writes do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedhead.compat import disable_torch_function_subclass, tree_map_only
from fusedhead.deferred import op_tables
from fusedhead.deferred.assignments import assignment, part_of, same_index, update
from fusedhead.deferred.call_program import Leaf, Mode, Unreadable, encode
from fusedhead.deferred.checkpoint_regions import has_left
from fusedhead.deferred.history import RebindInPlace, invalidate_history, update_history, with_grad_fn
from fusedhead.deferred.query import NotRecorded, Request
from fusedhead.deferred.record import pick, record
from fusedhead.deferred.results import Unread, Wide
from fusedhead.deferred.row_picks import picks
from fusedhead.deferred.state import DETACHING, RecordedCall, SharedLogits
from fusedhead.deferred.surroundings import checkpoint, op_by_op
from fusedhead.deferred.tensor import DeferredLogits, accept_grad_fn, is_unbuilt, plain
from fusedhead.deferred.wrappers import before_leaves, is_gathering


def call(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Any torch function with deferred logits among its arguments."""
    if func is Tensor.__iter__:
        return iter(args[0].unbind(0))
    if func is torch.autograd.grad:
        refuse_late(kwargs["inputs"] if "inputs" in kwargs else args[1])
    if func is Tensor.register_hook and is_gathering(args[1]) and is_unbuilt(args[0]):
        args[0]._deferred.shared.gathering.append(args[1])
        return before_leaves(args[0]._deferred.leaves, args[1])
    if getattr(func, "__name__", "") in op_tables.ASKS_FOR_GRADIENT:
        refuse_late(args[0])
    if op_tables.may_write_argument(func, args, kwargs):
        return write_deferred(func, args, kwargs)
    if getattr(func, "__name__", "") in op_tables.NUMBER_FUNCTIONS or op_tables.fails_at_once(func, args):
        return compute(func, args, kwargs)
    if func is Tensor.__getitem__:
        rows = masked(*args)
        if rows is not None:
            return rows
    if func is torch.functional.broadcast_tensors:
        shape = torch.broadcast_shapes(*(t.shape for t in args))
        return tuple(t if t.shape == shape else t.expand(shape) for t in args)
    if op_tables.takes_looks_only(func, args, kwargs):
        return call_on_layout(func, args, kwargs)
    arguments: list[Tensor] = []

    def local(tensor: Tensor) -> Leaf:
        for at, argument in enumerate(arguments):
            if argument is tensor:
                return Leaf(at)
        arguments.append(tensor)
        return Leaf(len(arguments) - 1)

    try:
        code = encode(args, local), encode(kwargs, local)
    except Unreadable:
        return compute(func, args, kwargs)
    tensors = [resolved(t) for t in arguments]
    subjects = [t for t in tensors if isinstance(t, DeferredLogits)]
    supported = all(map(is_supported_tensor, tensors)) and all(t._deferred.graph_output is not None for t in subjects)
    if not subjects or not supported:
        return compute(func, args, kwargs)
    mode = Mode.now(subjects[0].device.type)
    if as_eager(func, subjects, tensors, mode):
        return compute(func, args, kwargs)
    most = max(t.numel() // t.shape[-1] if t.ndim and t.shape[-1] else 0 for t in subjects)
    wide = any(t.numel() > most and t.ndim > 1 for t in tensors if not isinstance(t, DeferredLogits))
    try:
        if op_tables.lazy(func) and not wide:
            return record_unread(Request(RecordedCall(func, *code, copy_operands(tensors), mode)), args, kwargs)
        request = Request(RecordedCall(func, *code, tuple(tensors), mode))
        outcome = request.outcome()
        if isinstance(outcome, Unread) or not request.pays(outcome):
            return compute(func, args, kwargs)
        if isinstance(outcome, Wide):
            if not (op_tables.lazy(func) or op_tables.put_off(func)):
                return compute(func, args, kwargs)
            return record(Request(RecordedCall(func, *code, copy_operands(tensors), mode)))
        return request.answered(outcome)
    except NotRecorded:
        return compute(func, args, kwargs)


def as_eager(func: Any, subjects: Sequence[DeferredLogits], tensors: Sequence[Tensor], mode: Mode) -> bool:
    """Whether a call must run op by op on the plain tensor, because its surroundings observe single ops.

    A checkpointed region does not count if it returned the logits, since each pass over it makes new ones.
    """
    region = checkpoint()
    if op_by_op() or (region is not None and not all(t._deferred.shared.returned_in(region) for t in subjects)):
        return True
    marked = mode.grad and any(t._deferred.layout.marked for t in subjects)
    if marked or (func not in DETACHING and any(has_left(t._deferred) for t in subjects)):
        return True
    operands = [leaf for t in subjects for leaf in (t, *t._deferred.leaves)]
    # autograd cannot save inference tensors: eager code raises its own error
    differentiated = mode.grad and any(t.requires_grad for t in (*tensors, *operands))
    return differentiated and any(t.is_inference() for t in (*tensors, *operands))


def refuse_late(inputs: Any) -> None:
    """Raise RuntimeError where the gradient of ``inputs`` is wanted and nothing computes it any more."""
    late: list[bool] = []
    mapped(lambda t: late.append(t.requires_grad and t._deferred.shared.gradient_bypassed), inputs)
    if any(late):
        raise RuntimeError(
            "the gradient of deferred logits is asked for after a loss was taken of them. The loss's gradient passes "
            "them by, so theirs is never computed: ask for it before the loss (retain_grad(), register_hook()), or "
            'compile with options={"fusedhead.logits": "eager"} (FUSEDHEAD_LOGITS=eager), which computes logits at '
            "once."
        )


def record_unread(request: Request, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Deferred logits for the result of a call that is recorded unread."""
    first = args[0] if args else None
    if isinstance(first, DeferredLogits):
        shape = first._deferred.layout.shape
        chosen = picks(request.recorded.func.__name__, shape, args[1:], kwargs)
        if chosen is not None and not any(shape[pick.dim] in request.exact for each in chosen for pick in each):
            return pick(request, chosen)
    return record(request)


def copy_operands(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of the operands of a deferred call, which may be written before it runs."""
    return tuple(t if isinstance(t, DeferredLogits) else t.clone() for t in tensors)


def call_on_layout(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A call that reads only the shape, dtype and device of deferred logits."""
    if func.__name__ in op_tables.RESHAPED_AS and not isinstance(args[0], DeferredLogits):
        return op_tables.RESHAPED_AS[func.__name__](*args)
    layout = args[0]._deferred.layout
    shell = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device="meta")
    return func(shell, *args[1:], **{"device": args[0].device, **kwargs})


def resolved(tensor: Tensor) -> Tensor:
    """The plain tensor of deferred logits that are built already or that an autograd function returned."""
    if not isinstance(tensor, DeferredLogits) or is_unbuilt(tensor):
        return tensor
    return plain(tensor)


def is_supported_tensor(tensor: Tensor) -> bool:
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
    """Make the call on plain tensors. Where it returns one of them, return the deferred tensor that stands for it."""
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


def write_deferred(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A call that may write to deferred logits. Everything made of the same logits is computed first.

    Exceptions: nothing else shares the memory and an out-of-place call gives the new values (``p -= q``); or the write
    is to a part of the tensor that is its only dependent (``z[:, k] += c``).
    """
    if to_a_part(func.__name__, args, kwargs):
        return None if func is Tensor.__setitem__ else args[0]
    in_place = func.__name__ in op_tables.OUT_OF_PLACE and args and isinstance(args[0], DeferredLogits)
    if in_place and owns_its_memory(args[0]):
        tensor, before = args[0], with_grad_fn(args[0]._deferred)
        args, kwargs = mapped(lambda t: before if t is tensor else t, (args, kwargs))
        result = call(op_tables.OUT_OF_PLACE[func.__name__], args, kwargs)
        if isinstance(result, DeferredLogits) and rebind(tensor, result):
            return tensor
        args, kwargs = mapped(lambda t: tensor if t is before else t, (args, kwargs))
    groups: list[SharedLogits] = []
    sharing: list[tuple[DeferredLogits, Any]] = []
    mapped(lambda t: groups.append(t._deferred.shared), (args, kwargs))
    for shared in groups:
        for member in list(shared.members):
            alive = member()
            if alive is not None:
                plain(alive)
                sharing.append((alive, grad_fn_of(alive)))
    result = compute(func, args, kwargs)
    for tensor, before in sharing:
        after = grad_fn_of(tensor)
        if isinstance(after, RuntimeError):  # it raises where Python uses it, as in eager code
            invalidate_history(tensor, after)
        elif after != before:
            update_history(tensor)
    return result


def grad_fn_of(tensor: DeferredLogits) -> Any:
    """``requires_grad`` and ``grad_fn``, to notice a write; the error where torch refuses to give them."""
    try:
        operands = plain(tensor)
        return operands.requires_grad, operands.grad_fn
    except RuntimeError as error:
        return error


def to_a_part(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Rebind deferred logits to their value after a write to a part; returns whether that was possible."""
    if name == "__setitem__" and isinstance(args[0], DeferredLogits):
        whole, index, value = args
        part = None
        position = part_of(value)
        if position is not None and position[0] is whole and same_index(position[1], index, whole.ndim):
            return True  # the write to the part has rebound the whole already
        becomes = None if position else assignment(whole, index, value)
    else:
        part = args[0] if args else None
        location = part_of(part)
        if location is None:
            return False
        whole, index = location
        becomes = update(name, whole, index, args[1:], kwargs)
    if becomes is None or not owns_its_memory(whole, part):
        return False
    function, operands = becomes
    result = function(with_grad_fn(whole._deferred), *operands)
    if not isinstance(result, DeferredLogits) or not rebind(whole, result):
        return False
    return part is None or rebind(part, call(Tensor.__getitem__, (whole, index), {}))


def owns_its_memory(tensor: DeferredLogits, besides: Any = None) -> bool:
    """Whether a tensor that is not computed yet would own its memory, and no deferred tensor depends on it.

    ``besides``: a dependent tensor that does not count.
    """
    if not is_unbuilt(tensor) or (tensor.requires_grad and not torch.is_grad_enabled()):
        return False
    if tensor.is_inference() or torch.is_inference_mode_enabled() or has_left(tensor._deferred):
        return False
    recorded = tensor._deferred.recorded
    if not isinstance(recorded.func, torch.fx.GraphModule) and recorded.func.__name__ not in op_tables.FRESH:
        return False  # a view, perhaps
    members = (ref() for ref in tensor._deferred.shared.members)
    waiting = (m for m in members if m is not None and m is not besides)
    return not any(t is tensor for m in waiting for t in m._deferred.recorded.tensors)


def rebind(tensor: DeferredLogits, result: DeferredLogits) -> bool:
    """Rebind ``tensor`` to ``result`` if it is a tensor of the same form."""
    state, before = result._deferred, tensor._deferred
    if result._plain is not None or state.layout._replace(grad=before.layout.grad) != before.layout:
        return False
    if state.layout.grad:
        with disable_torch_function_subclass():
            RebindInPlace.apply(state, tensor, *state.recorded.tensors)
        accept_grad_fn(tensor)
    else:
        tensor._deferred = state
        torch.autograd.graph.increment_version(tensor)
    return True


DeferredLogits.handler = staticmethod(call)

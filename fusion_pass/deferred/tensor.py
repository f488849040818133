"""`DeferredLogits`: the tensor that represents logits that are not computed.

It answers questions about shape and type, keeps the calls that lead to it, and becomes the ordinary tensor when
asked to. What is done with a call on it is decided elsewhere (`deferred.dispatch`), and set as its `handler`.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from fusedhead.compat import (
    TracingContext,
    disable_torch_function_subclass,
    make_wrapper_subclass,
    missing,
    throw_on_data_ptr,
    tree_map_only,
)
from fusedhead.deferred.call_program import CallProgram, Leaf, Mode, encode, modes
from fusedhead.deferred.checkpoint_regions import has_left, is_recomputed, is_returned
from fusedhead.deferred.frames import skip_own_frames
from fusedhead.deferred.op_tables import ALONE, METADATA
from fusedhead.deferred.state import DeferredState, RecordedCall, SharedLogits, StaleLogits, TensorLayout, check_fresh
from fusedhead.deferred.surroundings import above_autograd, checkpoint, out_of_sight
from fusedhead.deferred.wrappers import before_leaves, sink_of
from fusedhead.graph.run_counts import count_built

aten = torch.ops.aten


class DeferredLogits(Tensor):
    """A tensor of logits that exists when it must.

    It has the shape, strides, dtype, device, ``requires_grad`` and a ``grad_fn`` of the tensor it stands for.
    Raises StaleLogits when it has to be computed after the weight or the hidden states have changed.
    """

    handler: ClassVar[Callable[..., Any]]
    _deferred: DeferredState
    _plain: Tensor | None
    _accepted_grad_fn: Any  # the ``grad_fn`` given to it here: with another, an autograd function has returned it

    @staticmethod
    def __new__(cls, state: DeferredState) -> DeferredLogits:
        shape, stride, dtype, _, _, inference, marked = state.layout
        with torch.inference_mode(inference):
            self = make_wrapper_subclass(cls, shape, stride, dtype=dtype, device=state.leaves[0].device)
        # there is no memory behind it: a kernel that takes its address gets an error instead of a null pointer
        throw_on_data_ptr(self)
        self._deferred, self._plain, self._accepted_grad_fn = state, None, None
        state.shared.join(self)
        if marked:
            with disable_torch_function_subclass():
                self.requires_grad_()
        return self

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            first = args[0] if args else next(iter(kwargs.values()))
            traced = func in OF_MEMORY and compiling()
            if func is Tensor._is_view and traced:
                return False  # for compilers it has no base, and begins where its memory does
            exists = isinstance(first, DeferredLogits) and first._plain is not None and not traced
            subject = as_plain(first) if exists else first
            if func is Tensor.storage_offset and subject is first and not traced:
                return first._deferred.layout.offset
            with disable_torch_function_subclass():
                return func(*args, **kwargs) if subject is first else func(subject, *args[1:], **kwargs)
        traced = compiling()
        if func in ALONE and (traced or args[0]._plain is None):
            return None
        if traced and func is Tensor.__repr__:
            return f"DeferredLogits({args[0]._deferred.layout})"
        if traced:
            with disable_torch_function_subclass():
                return func(*args, **kwargs)
        return cls.handler(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """For callers that go past ``__torch_function__``: the numbers, below autograd."""
        state = args[0]._deferred if args and isinstance(args[0], DeferredLogits) else None
        if state is not None and state.graph_output is None and func in (aten.detach.default, aten.alias.default):
            return inside_compiler(state.program, tuple(map(func, state.leaves)), state.layout)
        if torch.Tag.inplace_view in func.tags and state is not None and state.graph_output is not None:
            return reshaped(func, args, kwargs or {})
        args, kwargs = tree_map_only(DeferredLogits, numbers, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """For compilers: the tensors it is made of, and what is constant."""
        exist_first(self)
        state, numbers = self._deferred, self._plain
        if state.program is MATERIALISED:
            numbers = state.leaves[0]
        if numbers is not None:
            return ["_numbers"], (MATERIALISED, numbers.dtype, (numbers.requires_grad,))
        # Dynamo guards the names that it is given, on tensors that may be stale; what AOTAutograd compiles takes the
        # tensors by the names that it was given, to compute with them
        computes = sys._getframe(1).f_globals.get("__name__", "").startswith("torch._functorch.")
        names = [f"{'_fresh' if computes else '_leaf'}{at}" for at in range(len(state.leaves))]
        # which of them a gradient reaches: guards do not ask it of inner tensors
        return names, (state.program, state.layout.dtype, tuple(t.requires_grad for t in state.leaves))

    def __getattr__(self, name: str) -> Tensor:
        """The tensors that ``__tensor_flatten__`` names. Raises StaleLogits for ``_fresh0`` and so on."""
        if name == "_numbers":
            return self._deferred.leaves[0] if self._plain is None else self._plain
        if not name.startswith(("_leaf", "_fresh")):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        if name.startswith("_fresh") and self._deferred.graph_output is not None and not compiling():
            check_fresh(self._deferred)
        return self._deferred.leaves[int(name.lstrip("_leafrsh"))]

    def as_subclass(self, cls: type) -> Any:
        """For torch, which would ask for an alias of this tensor below Python, and find a tensor of another class."""
        return plain(self).as_subclass(cls)

    def _stable_hash_for_caching(self) -> str:
        leaves = (self._plain,) if self._plain is not None else self._deferred.leaves
        shapes = [(tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad) for t in (self, *leaves)]
        return f"{PROCESS} {self.__tensor_flatten__()[1][0].serial} {shapes}"

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], constant: Any, shape: Any, stride: Any) -> DeferredLogits:
        program, dtype, _ = constant
        return inside_compiler(program, tuple(inner.values()), TensorLayout(shape, stride, dtype, False))


def exist_first(tensor: DeferredLogits) -> None:
    """Compute logits before a function is compiled for them, in three cases where their sources cannot replace them.

    A checkpointed region that got them from outside must find them computed in both passes or in neither; logits that
    have left the region that returned them get a gradient of what it recomputes; and logits marked as requiring a
    gradient that reaches nothing have no such sources. For stale logits the call raises.
    """
    if tensor._plain is not None or tensor._deferred.graph_output is None:
        return
    region, state = checkpoint(), tensor._deferred
    marked = state.layout.marked and torch.is_grad_enabled()
    if marked or has_left(state) or (region and not state.shared.returned_in(region)):
        with suppress(StaleLogits):
            plain(tensor)


def compiling() -> bool:
    """Whether Dynamo or AOTAutograd is tracing."""
    return TracingContext.try_get() is not None


def numbers(tensor: DeferredLogits) -> Tensor:
    """The plain tensor without a gradient, for ``__torch_dispatch__``, which runs below autograd."""
    if tensor._deferred.graph_output is None:
        with torch.no_grad():
            return tensor._deferred.program(*tensor._deferred.leaves, traced=True)
    with above_autograd():
        return plain(tensor).detach()


def reshaped(func: Any, args: tuple, kwargs: dict[str, Any]) -> DeferredLogits:
    """Apply a write to the shape or memory of deferred logits (``z.set_()``) to their plain tensor."""
    with above_autograd():
        target = plain(args[0])
    rest, kwargs = tree_map_only(DeferredLogits, numbers, (args[1:], kwargs))
    func(target, *rest, **kwargs)
    if not target.is_inference():
        torch.autograd.graph.increment_version(target)
    return args[0]


# multiprocessing queues pickle tensors by class: deferred logits are pickled as their plain tensor, sharing its memory
ForkingPickler.register(DeferredLogits, lambda tensor: reduce_tensor(plain(tensor)))

OF_MEMORY = (Tensor._is_view, Tensor.storage_offset)
MATERIALISED = CallProgram((), Leaf(0))  # the program of logits that are computed already: the tensor itself


def inside_compiler(program: CallProgram, leaves: tuple[Tensor, ...], layout: TensorLayout) -> DeferredLogits:
    """The deferred logits that a compiler traces with: the same program on the compiler's own tensors."""
    places = iter(range(len(leaves)))
    code, none = encode(leaves, lambda _: Leaf(next(places))), encode({}, lambda _: Leaf(0))
    recorded = RecordedCall(program, code, none, leaves, Mode(False, None))
    return DeferredLogits(DeferredState(None, program, leaves, (), recorded, None, SharedLogits(), layout))


# Tell Dynamo to skip this package's frames.
if not missing:
    skip_own_frames(traced="functional")

PROCESS = uuid.uuid4().hex  # programs are compared by identity: no other process has these


class MaterialiseInForward(torch.autograd.Function):
    """Computes deferred logits that another autograd function returned; the gradient goes through that function."""

    @staticmethod
    def forward(ctx: Any, tensor: DeferredLogits) -> Tensor:
        ctx.set_materialize_grads(False)
        numbers = run_recorded_call(tensor._deferred) if tensor._plain is None else tensor._plain
        # the result shares the memory; for a view autograd has to know the base, so that a write to either raises
        shares = numbers._is_view() and not is_returned(tensor._deferred)
        return numbers.view_as(numbers) if shares else numbers.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad


def wrapper_grad_fn(tensor: DeferredLogits) -> Any:
    with disable_torch_function_subclass():
        return tensor.grad_fn


def accept_grad_fn(tensor: DeferredLogits) -> None:
    """Record the ``grad_fn`` that this package gave, so that one of another autograd function is told apart."""
    tensor._accepted_grad_fn = wrapper_grad_fn(tensor)


def is_function_result(tensor: DeferredLogits) -> bool:
    """Whether an autograd function returned the tensor from its forward. DDP's, which only copies, does not count."""
    grad_fn = wrapper_grad_fn(tensor)
    if grad_fn is None or grad_fn is tensor._accepted_grad_fn:
        return False
    return not is_a_wrapped_copy(tensor, grad_fn)


def is_unbuilt(tensor: DeferredLogits) -> bool:
    """Whether the numbers are still to be computed, by the calls that were recorded."""
    return tensor._plain is None and not is_function_result(tensor)


def is_a_wrapped_copy(tensor: DeferredLogits, grad_fn: Any) -> bool:
    """Whether DDP has returned a copy of deferred logits, which then takes over the state of the original."""
    recorded, queue = tensor._deferred.recorded, sink_of(grad_fn)
    copied = recorded.tensors[0] if queue is not None and recorded.func is Tensor.clone else None
    if not isinstance(copied, DeferredLogits) or tensor._plain is not None or copied._plain is not None:
        return False
    if is_function_result(copied) or not copied.requires_grad:
        return False
    before_leaves(copied._deferred.leaves, queue)  # type: ignore[arg-type]
    tensor._deferred = copied._deferred
    accept_grad_fn(tensor)
    return True


def materialise_in_forward(tensor: DeferredLogits) -> None:
    with modes(Mode(True, None), tensor.device.type):
        tensor._plain = MaterialiseInForward.apply(tensor)
    accept_grad_fn(tensor)


def plain(tensor: DeferredLogits) -> Tensor:
    """The ordinary tensor that ``tensor`` stands for: exact, differentiable, computed on first use."""
    state, numbers = tensor._deferred, tensor._plain
    if numbers is not None and not is_function_result(tensor):
        return numbers
    if numbers is None and state.recorded.result is None:
        check_fresh(state)
        for operand in state.recorded.tensors:
            as_plain(operand)  # before the lock is taken: another head's logits have their own
    with state.shared.lock, above_autograd(), out_of_sight():  # what exists from here on has a history
        if is_function_result(tensor) or (tensor._plain is None and is_recomputed(state, run_recorded_call(state))):
            materialise_in_forward(tensor)
        elif tensor._plain is None:
            tensor._plain = run_recorded_call(state)
    return tensor._plain  # type: ignore[return-value]


def as_plain(tensor: Tensor) -> Tensor:
    return plain(tensor) if isinstance(tensor, DeferredLogits) else tensor


def run_recorded_call(state: DeferredState) -> Tensor:
    first = is_returned(state) and state.recorded.result is None
    if first:
        count_built(state.graph_output.recipe.runs, state.shared.built_for)  # type: ignore[union-attr]
    result = state.recorded.evaluate(as_plain)
    if first:
        state.shared.gather_before(result)
    return result if state.part is None else result[state.part]

"""`DeferredLogits`: the tensor that represents logits that are not computed.

It answers questions about shape and type, keeps the calls that lead to it, and becomes the ordinary tensor when
asked to. What is done with a call on it is decided elsewhere (`deferred.dispatch`), and set as its `handler`.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Sequence
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
from fusedhead.deferred.frames import skip_own_frames
from fusedhead.deferred.op_tables import ALONE, METADATA
from fusedhead.deferred.state import Family, Knowledge, RecordedCall, StaleLogits, TensorLayout, check_fresh
from fusedhead.deferred.surroundings import above_autograd, checkpoint, out_of_sight
from fusedhead.deferred.wrappers import before_leaves, sink_of
from fusedhead.graph.run_counts import Run, built

aten = torch.ops.aten


class DeferredLogits(Tensor):
    """A tensor of logits that exists when it must.

    It has the shape, strides, dtype, device, ``requires_grad`` and a ``grad_fn`` of the tensor it stands for.
    Raises StaleLogits when it has to be computed after the weight or the hidden states have changed.
    """

    handler: ClassVar[Callable[..., Any]]
    _known: Knowledge
    _plain: Tensor | None
    _own: Any  # the ``grad_fn`` that it was given here: with another one, an autograd function has returned it

    @staticmethod
    def __new__(cls, knowledge: Knowledge) -> DeferredLogits:
        shape, stride, dtype, _, _, inference, marked = knowledge.layout
        with torch.inference_mode(inference):
            self = make_wrapper_subclass(cls, shape, stride, dtype=dtype, device=knowledge.leaves[0].device)
        # there is no memory behind it: a kernel that takes its address gets an error instead of a null pointer
        throw_on_data_ptr(self)
        self._known, self._plain, self._own = knowledge, None, None
        knowledge.family.join(self)
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
                return first._known.layout.offset
            with disable_torch_function_subclass():
                return func(*args, **kwargs) if subject is first else func(subject, *args[1:], **kwargs)
        traced = compiling()
        if func in ALONE and (traced or args[0]._plain is None):
            return None
        if traced and func is Tensor.__repr__:
            return f"DeferredLogits({args[0]._known.layout})"
        if traced:
            with disable_torch_function_subclass():
                return func(*args, **kwargs)
        return cls.handler(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """For callers that go past ``__torch_function__``: the numbers, below autograd."""
        knowledge = args[0]._known if args and isinstance(args[0], DeferredLogits) else None
        if knowledge is not None and knowledge.origin is None and func in (aten.detach.default, aten.alias.default):
            return inside_compiler(knowledge.program, tuple(map(func, knowledge.leaves)), knowledge.layout)
        if torch.Tag.inplace_view in func.tags and knowledge is not None and knowledge.origin is not None:
            return reshaped(func, args, kwargs or {})
        args, kwargs = tree_map_only(DeferredLogits, numbers, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """For compilers: the tensors it is made of, and what is constant."""
        exist_first(self)
        knowledge, numbers = self._known, self._plain
        if knowledge.program is SPENT:
            numbers = knowledge.leaves[0]
        if numbers is not None:
            return ["_numbers"], (SPENT, numbers.dtype, (numbers.requires_grad,))
        # Dynamo guards the names that it is given, on tensors that may be stale; what AOTAutograd compiles takes the
        # tensors by the names that it was given, to compute with them
        computes = sys._getframe(1).f_globals.get("__name__", "").startswith("torch._functorch.")
        names = [f"{'_fresh' if computes else '_leaf'}{at}" for at in range(len(knowledge.leaves))]
        # which of them a gradient reaches: guards do not ask it of inner tensors
        return names, (knowledge.program, knowledge.layout.dtype, tuple(t.requires_grad for t in knowledge.leaves))

    def __getattr__(self, name: str) -> Tensor:
        """The tensors that ``__tensor_flatten__`` names. Raises StaleLogits for ``_fresh0`` and so on."""
        if name == "_numbers":
            return self._known.leaves[0] if self._plain is None else self._plain
        if not name.startswith(("_leaf", "_fresh")):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        if name.startswith("_fresh") and self._known.origin is not None and not compiling():
            check_fresh(self._known)
        return self._known.leaves[int(name.lstrip("_leafrsh"))]

    def as_subclass(self, cls: type) -> Any:
        """For torch, which would ask for an alias of this tensor below Python, and find a tensor of another class."""
        return plain(self).as_subclass(cls)

    def _stable_hash_for_caching(self) -> str:
        leaves = (self._plain,) if self._plain is not None else self._known.leaves
        shapes = [(tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad) for t in (self, *leaves)]
        return f"{PROCESS} {self.__tensor_flatten__()[1][0].serial} {shapes}"

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], constant: Any, shape: Any, stride: Any) -> DeferredLogits:
        program, dtype, _ = constant
        return inside_compiler(program, tuple(inner.values()), TensorLayout(shape, stride, dtype, False))


def exist_first(tensor: DeferredLogits) -> None:
    """Compute logits before anything is compiled for them, where what they are made of would not do.

    That is in a checkpointed region that has them from outside, whose second pass must find them as the first did,
    whoever reads them in between; and where they require a gradient that reaches nothing. The call says what is stale.
    """
    if tensor._plain is not None or tensor._known.origin is None:
        return
    region, known = checkpoint(), tensor._known
    if (known.layout.marked and torch.is_grad_enabled()) or (region and not known.family.returned_in(region)):
        with suppress(StaleLogits):
            plain(tensor)


def compiling() -> bool:
    """Whether a compiler looks at tensors here, or traces with them."""
    return TracingContext.try_get() is not None


def numbers(tensor: DeferredLogits) -> Tensor:
    """The values, without a gradient. For ``__torch_dispatch__`` alone, where autograd is switched off."""
    if tensor._known.origin is None:
        with torch.no_grad():
            return tensor._known.program(*tensor._known.leaves, traced=True)
    with above_autograd():
        return plain(tensor).detach()


def reshaped(func: Any, args: tuple, kwargs: dict[str, Any]) -> DeferredLogits:
    """A write below Python to the shape or memory of deferred logits (``z.set_()``), made to what they stand for."""
    with above_autograd():
        target = plain(args[0])
    rest, kwargs = tree_map_only(DeferredLogits, numbers, (args[1:], kwargs))
    func(target, *rest, **kwargs)
    if not target.is_inference():
        torch.autograd.graph.increment_version(target)
    return args[0]


# a queue between processes takes tensors by their class: these as the ordinary ones, whose memory it shares
ForkingPickler.register(DeferredLogits, lambda tensor: reduce_tensor(plain(tensor)))

OF_MEMORY = (Tensor._is_view, Tensor.storage_offset)
SPENT = CallProgram((), Leaf(0))  # of a tensor that exists


def inside_compiler(program: CallProgram, leaves: tuple[Tensor, ...], layout: TensorLayout) -> DeferredLogits:
    """What a compiler gets in the place of deferred logits: the program, on its own tensors."""
    places = iter(range(len(leaves)))
    code, none = encode(leaves, lambda _: Leaf(next(places))), encode({}, lambda _: Leaf(0))
    recorded = RecordedCall(program, code, none, leaves, Mode(False, None))
    return DeferredLogits(Knowledge(None, program, leaves, (), recorded, None, Family(), layout))


# Tell Dynamo to skip this package's frames.
if not missing:
    skip_own_frames(traced="functional")

PROCESS = uuid.uuid4().hex  # programs are compared by identity: no other process has these


class Adopted(torch.autograd.Function):
    """The numbers of deferred logits that another autograd function has made its result: its gradient counts."""

    @staticmethod
    def forward(ctx: Any, tensor: DeferredLogits) -> Tensor:
        ctx.set_materialize_grads(False)
        numbers = made_by_call(tensor._known) if tensor._plain is None else tensor._plain
        # in the memory that it shares; of a view autograd has to know whose, for a write to either is an error then
        return numbers.view_as(numbers) if numbers._is_view() else numbers.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad


def own_grad_fn(tensor: DeferredLogits) -> Any:
    with disable_torch_function_subclass():
        return tensor.grad_fn


def settle(tensor: DeferredLogits) -> None:
    """The history that it has now is that of what it stands for."""
    tensor._own = own_grad_fn(tensor)


def is_adopted(tensor: DeferredLogits) -> bool:
    """Whether an autograd function made the tensor, in its forward, and returned it: not DDP's, a copy of its input."""
    grad_fn = own_grad_fn(tensor)
    if grad_fn is None or grad_fn is tensor._own:
        return False
    return not is_a_wrapped_copy(tensor, grad_fn)


def is_a_wrapped_copy(tensor: DeferredLogits, grad_fn: Any) -> bool:
    """Whether DDP has returned a copy of deferred logits: it stands from here on for what they stand for."""
    recorded, queue = tensor._known.recorded, sink_of(grad_fn)
    copied = recorded.tensors[0] if queue is not None and recorded.func is Tensor.clone else None
    if not isinstance(copied, DeferredLogits) or tensor._plain is not None or copied._plain is not None:
        return False
    if is_adopted(copied) or not copied.requires_grad:
        return False
    before_leaves(copied._known.leaves, queue)  # type: ignore[arg-type]
    tensor._known = copied._known
    settle(tensor)
    return True


def adopt(tensor: DeferredLogits) -> None:
    with modes(Mode(True, None), tensor.device.type):
        tensor._plain = Adopted.apply(tensor)
    settle(tensor)


def plain(tensor: DeferredLogits) -> Tensor:
    """The ordinary tensor that ``tensor`` stands for: exact, differentiable, computed on first use."""
    knowledge, numbers = tensor._known, tensor._plain
    if numbers is not None and not is_adopted(tensor):
        return numbers
    if numbers is None and knowledge.recorded.result is None:
        check_fresh(knowledge)
        for operand in knowledge.recorded.tensors:
            as_plain(operand)  # before the lock is taken: another head's logits have their own
    with knowledge.family.lock, above_autograd(), out_of_sight():  # what exists from here on has a history
        if is_adopted(tensor):
            adopt(tensor)
        elif tensor._plain is None:
            tensor._plain = made_by_call(knowledge)
    return tensor._plain  # type: ignore[return-value]


def as_plain(tensor: Tensor) -> Tensor:
    return plain(tensor) if isinstance(tensor, DeferredLogits) else tensor


def made_by_call(knowledge: Knowledge) -> Tensor:
    origin, recorded = knowledge.origin, knowledge.recorded
    first = origin is not None and recorded.func is origin.recipe.program and recorded.result is None
    if first:
        count_built(origin.recipe.runs, knowledge.family.built_for)  # type: ignore[union-attr]
    result = knowledge.recorded.made(as_plain)
    if first:
        knowledge.family.gather_before(result)
    return result if knowledge.part is None else result[knowledge.part]


def count_built(runs: Sequence[Run], why: str) -> None:
    """Count logits that are built: for a use, or in spite of having been deferred, because of ``why``."""
    if not why:
        built(runs)
    for run in runs if why else ():
        run.deferred.take_back()
        run.at_once.add(why)

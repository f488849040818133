"""Deferred logits: the tensor that stands for logits that were not computed, and may never be.

It answers questions about shape and type, keeps the calls that lead to it, and becomes the ordinary tensor when
asked to. What is done with a call on it is decided elsewhere (`deferred_calls`), and set as its `handler`.
"""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fusedhead.deferred_outcome import Guard, Outcome
from fusedhead.deferred_program import Leaf, Mode, Program, decode, encode, modes, unobserved
from fusedhead.deferred_tables import ALONE, METADATA
from fusedhead.returned import Recipe

aten = torch.ops.aten


class StaleLogits(RuntimeError):
    """Deferred logits were asked for after what they are made of had changed."""


class Layout(NamedTuple):
    """What can be asked of a tensor without computing it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    grad: bool  # whether a gradient flows through it


@dataclass(eq=False)
class Origin:
    """One returned tensor of one compiled graph, and what has been learnt about calls on it."""

    recipe: Recipe
    memory: int
    recorded: dict[Hashable, tuple[tuple[Program, ...], list[Layout], Any]] = field(default_factory=dict)
    outcomes: dict[Hashable, list[tuple[Guard, Outcome]]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.exact = frozenset({0, 1, *self.recipe.exact})


@dataclass(eq=False)
class Recorded:
    """A call that was not made yet. Its arguments are encoded over ``tensors``."""

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    tensors: tuple[Tensor, ...]
    mode: Mode
    result: Any = None

    def on(self, tensors: Sequence[Tensor]) -> Any:
        """The call, made with other tensors in the place of its own."""
        args = decode(self.args, lambda leaf: tensors[leaf.at])  # type: ignore[union-attr]
        kwargs = decode(self.kwargs, lambda leaf: tensors[leaf.at])  # type: ignore[union-attr]
        return self.func(*args, **kwargs)

    def made(self) -> Any:
        """The result on plain tensors, computed once, in the modes it was recorded under."""
        if self.result is None:
            tensors = [plain(t) if isinstance(t, DeferredLogits) else t for t in self.tensors]
            with modes(self.mode, tensors[0].device.type):
                self.result = self.on(tensors)
        return self.result

    def layouts(self) -> tuple[list[Layout], Any]:
        """The layouts of the results, found on fake tensors, and the container they come in (None: a single one)."""
        with unobserved(), FakeTensorMode() as fakes:
            like = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device, requires_grad=t.requires_grad)
                for t in self.tensors
            ]
            with modes(self.mode, self.tensors[0].device.type), fakes:
                result = self.on(like)
        many = None if isinstance(result, Tensor) else type(result)
        results = [result] if many is None else list(result)
        return [Layout(tuple(r.shape), tuple(r.stride()), r.dtype, r.requires_grad) for r in results], many


@dataclass(eq=False)
class Family:
    """Everything made of one returned tensor."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    members: list[weakref.ref] = field(default_factory=list)

    def join(self, member: DeferredLogits) -> None:
        if len(self.members) > 256:
            self.members = [m for m in self.members if m() is not None]
        self.members.append(weakref.ref(member))


State = tuple[int, int]  # version and address


@dataclass(eq=False)
class Knowledge:
    """What a `DeferredLogits` knows besides its shape."""

    origin: Origin | None  # None inside a compiler
    program: Program
    leaves: tuple[Tensor, ...]
    states: tuple[State, ...]  # of the leaves, when they were taken in
    recorded: Recorded  # the call that makes it ...
    part: int | None  # ... or one of its results
    family: Family
    layout: Layout
    # statistics by name, [N], rows in order; those under True were made with gradients recorded
    statistics: dict[bool, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def made_of(self) -> DeferredLogits | None:
        return next((t for t in self.recorded.tensors if isinstance(t, DeferredLogits)), None)


class DeferredLogits(Tensor):
    """A tensor of logits that exists when it must.

    It has the shape, strides, dtype, device, ``requires_grad`` and a ``grad_fn`` of the tensor it stands for.
    Raises StaleLogits when it has to be computed after the weight or the hidden states have changed.
    """

    handler: ClassVar[Callable[..., Any]]
    _known: Knowledge
    _plain: Tensor | None

    @staticmethod
    def __new__(cls, known: Knowledge) -> DeferredLogits:
        shape, stride, dtype, _ = known.layout
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, stride, dtype=dtype, device=known.leaves[0].device
        )
        # there is no memory behind it: a kernel that takes its address gets an error instead of a null pointer
        torch._C._set_throw_on_mutable_data_ptr(self)
        self._known, self._plain = known, None
        known.family.join(self)
        return self

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            first = args[0] if args else next(iter(kwargs.values()))
            spent = first._plain if isinstance(first, DeferredLogits) else None
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs) if spent is None else func(spent, *args[1:], **kwargs)
        compiling = torch._guards.TracingContext.try_get() is not None  # a compiler looks at it, or traces with it
        if func in ALONE and (compiling or args[0]._plain is None):
            return None
        if compiling and func is Tensor.__repr__:
            return f"DeferredLogits({args[0]._known.layout})"
        if compiling:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return cls.handler(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """For callers that go past ``__torch_function__``: the numbers, below autograd."""
        known = args[0]._known if args and isinstance(args[0], DeferredLogits) else None
        if known is not None and known.origin is None and func in (aten.detach.default, aten.alias.default):
            return traced(known.program, tuple(map(func, known.leaves)), known.layout)
        args, kwargs = tree_map_only(DeferredLogits, numbers, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """For compilers: the tensors it is made of, and what is constant."""
        if self._plain is not None:
            return ["_leaf0"], (SPENT, self._plain.dtype)
        names = [f"_leaf{at}" for at in range(len(self._known.leaves))]
        return names, (self._known.program, self._known.layout.dtype)

    def __getattr__(self, name: str) -> Tensor:
        """The tensors that ``__tensor_flatten__`` names."""
        if not name.startswith("_leaf"):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        leaves = self._known.leaves if self._plain is None else (self._plain,)
        return leaves[int(name.removeprefix("_leaf"))]

    def _stable_hash_for_caching(self) -> str:
        leaves = (self._plain,) if self._plain is not None else self._known.leaves
        shapes = [(tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad) for t in (self, *leaves)]
        return f"{PROCESS} {self.__tensor_flatten__()[1][0].serial} {shapes}"

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], constant: Any, shape: Any, stride: Any) -> DeferredLogits:
        program, dtype = constant
        return traced(program, tuple(inner.values()), Layout(shape, stride, dtype, False))


def numbers(tensor: DeferredLogits) -> Tensor:
    """The values, without a gradient."""
    if tensor._known.origin is None:
        with torch.no_grad():
            return tensor._known.program(*tensor._known.leaves)
    return plain(tensor).detach()


SPENT = Program((), Leaf(0))  # of a tensor that exists


def traced(program: Program, leaves: tuple[Tensor, ...], layout: Layout) -> DeferredLogits:
    """What a compiler gets in the place of deferred logits: the program, on its own tensors."""
    places = iter(range(len(leaves)))
    code, none = encode(leaves, lambda _: Leaf(next(places))), encode({}, lambda _: Leaf(0))
    recorded = Recorded(program, code, none, leaves, Mode(False, None))
    return DeferredLogits(Knowledge(None, program, leaves, (), recorded, None, Family(), layout))


# Dynamo compiles what runs under a compiled function: not this package, which handles tensors it cannot trace
torch._dynamo.trace_rules.add("fusedhead")

PROCESS = uuid.uuid4().hex  # programs are compared by identity: no other process has these


class Link(torch.autograd.Function):
    """Gives deferred logits a ``grad_fn``, for those who walk autograd's graph or use the tensor in C++."""

    @staticmethod
    def forward(ctx: Any, known: Knowledge, *inputs: Tensor) -> Any:
        ctx.recorded, ctx.part = known.recorded, known.part
        ctx.save_for_backward(*inputs)
        return DeferredLogits(known)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        recorded = ctx.recorded
        inputs = [plain(t) if isinstance(t, DeferredLogits) else t for t in ctx.saved_tensors]
        grad = plain(grad) if isinstance(grad, DeferredLogits) else grad
        needed = [at for at, need in enumerate(ctx.needs_input_grad[1:]) if need]
        leaves = [t.detach().requires_grad_() if at in needed else t for at, t in enumerate(inputs)]
        with modes(recorded.mode, grad.device.type), torch.enable_grad():
            result = recorded.on(leaves)
            result = result if ctx.part is None else result[ctx.part]
            grads = torch.autograd.grad(result, [leaves[at] for at in needed], grad, allow_unused=True)
        given = dict(zip(needed, grads))
        return (None, *(given.get(at) for at in range(len(inputs))))


def linked(known: Knowledge) -> DeferredLogits:
    """Deferred logits that autograd knows of."""
    return Link.apply(known, *known.recorded.tensors) if known.layout.grad else DeferredLogits(known)


class Adopted(torch.autograd.Function):
    """The numbers of deferred logits that another autograd function has made its result: its gradient counts."""

    @staticmethod
    def forward(ctx: Any, tensor: DeferredLogits) -> Tensor:
        return made_by_call(tensor._known).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def is_adopted(tensor: DeferredLogits) -> bool:
    """Whether an autograd function made the tensor, in its forward, and returned it."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.requires_grad and not tensor._known.layout.grad


def state(tensor: Tensor) -> State:
    """What changes when a tensor is written to or given other memory."""
    return (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())


def check_fresh(known: Knowledge) -> None:
    """Raise StaleLogits if a leaf has changed since it was taken in."""
    for at, (leaf, before) in enumerate(zip(known.leaves, known.states)):
        now = state(leaf)
        freed = leaf.untyped_storage().nbytes() == 0 and leaf.numel() > 0
        if now == before and not freed:
            continue
        names = known.origin.recipe.names
        what = names[at] if at < len(names) else "an operand"
        how = (
            "has been freed or moved" if freed or now[1] != before[1]
            else f"has been changed in place (version {before[0]}, now {now[0]})"
        )  # fmt: skip
        raise StaleLogits(
            f"these logits were deferred, and {what}, which they are made of, {how} since the forward pass. "
            "Read them before that (for a weight: before optimizer.step()), or compile with "
            'options={"fusedhead.logits": "eager"} (FUSEDHEAD_LOGITS=eager), which computes logits at once.'
        )


def plain(tensor: DeferredLogits) -> Tensor:
    """The ordinary tensor that ``tensor`` stands for: exact, differentiable, computed on first use."""
    known = tensor._known
    with known.family.lock:
        if tensor._plain is None:
            if known.recorded.result is None:
                check_fresh(known)
            tensor._plain = Adopted.apply(tensor) if is_adopted(tensor) else made_by_call(known)
    return tensor._plain


def made_by_call(known: Knowledge) -> Tensor:
    result = known.recorded.made()
    return result if known.part is None else result[known.part]

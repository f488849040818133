"""State of deferred logits: the graph output they come from, the calls that compute them, and whether these still hold.

Plain data and its upkeep. `deferred.tensor` has the tensor that carries it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedhead.compat import FakeTensorMode
from fusedhead.deferred.call_program import CallProgram, Mode, decode, modes
from fusedhead.deferred.optimizer_steps import NO_STEPS, Steps, steps
from fusedhead.deferred.reasons import Stale
from fusedhead.deferred.results import Guard, Outcome
from fusedhead.deferred.surroundings import checkpoint, out_of_sight, trial
from fusedhead.graph.aliases import storage
from fusedhead.graph.reasons import refuse
from fusedhead.graph.recipes import Recipe


class StaleLogits(RuntimeError):
    """Deferred logits were asked for after what they are made of had changed."""


class Recording(Enum):
    """Whether a result can be differentiated, or may become part of what is."""

    DIFFERENTIABLE = "with gradients"
    PLAIN = "without"
    INFERENCE = "in inference mode"

    @staticmethod
    def of(grad: bool, mode: Mode) -> Recording:
        return Recording.INFERENCE if mode.inference else Recording.DIFFERENTIABLE if grad else Recording.PLAIN


class TensorLayout(NamedTuple):
    """The properties of a tensor that are known without computing it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    grad: bool  # whether a gradient flows through it
    offset: int = 0  # where it begins in its memory
    inference: bool = False  # whether it is an inference tensor
    # a view taken under no_grad of a tensor that requires a gradient: it says that it requires one too, without history
    marked: bool = False

    @staticmethod
    def of(tensor: Tensor) -> TensorLayout:
        return TensorLayout(
            tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.requires_grad,
            int(tensor.storage_offset()), tensor.is_inference(),
        )  # fmt: skip


@dataclass(eq=False)
class GraphOutput:
    """One returned tensor of one compiled graph, and a cache of how calls on it are answered."""

    recipe: Recipe
    memory: int
    rows_from: int  # bytes of logits from which on it pays to compute something token by token
    recorded: dict[Hashable, tuple[tuple[CallProgram, ...], list[TensorLayout], Any]] = field(default_factory=dict)
    outcomes: dict[Hashable, list[tuple[Guard, Outcome]]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.exact = frozenset({0, 1, *self.recipe.exact})


class Same(NamedTuple):
    """A call that hands one of its tensors back."""

    at: int


@dataclass(eq=False)
class RecordedCall:
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

    def evaluate(self, existing: Callable[[Tensor], Tensor]) -> Any:
        """The result on tensors that exist, computed once, in the modes it was recorded under."""
        if self.result is None:
            tensors = list(map(existing, self.tensors))
            with out_of_sight(), modes(self.mode, tensors[0].device.type):
                self.result = self.on(tensors)
        return self.result

    def on_stand_ins(self) -> tuple[list[Tensor], Any]:
        """The call made on fake tensors with the layouts of its own: these tensors, and the result.

        Their sizes are numbers, so that C++ code that takes the address of one raises. With symbols for sizes such code
        finds the tensor empty and reads through a null pointer.
        """
        # in inference mode fake tensors do not see which ops a composite call (``reshape``) makes
        as_they_are = not self.mode.inference
        with trial(), FakeTensorMode() as fakes:
            like = [of_the_form(t, as_they_are and t.is_inference()) for t in self.tensors]
            with modes(self.mode.read, self.tensors[0].device.type), fakes:
                return like, self.on(like)

    def layouts(self) -> tuple[list[TensorLayout], Any]:
        """The layouts of the results, found on fake tensors, and the container they come in (None: a single one).

        Or none, and `Same`.
        """
        like, result = self.on_stand_ins()
        if any(result is tensor for tensor in like):  # `float()` of float32
            return [], Same(next(at for at, tensor in enumerate(like) if tensor is result))
        many = None if isinstance(result, Tensor) else type(result)
        results = [result] if many is None else list(result)
        layouts = list(map(TensorLayout.of, results))
        if not self.mode.grad:
            marks = MARKED and self.func not in DETACHING and self.tensors[0].requires_grad
            layouts = [la._replace(grad=False, marked=marks and r._is_view()) for la, r in zip(layouts, results)]
        if self.mode.inference:
            layouts = [la._replace(inference=self.infers(like, r)) for la, r in zip(layouts, results)]
        return layouts, many

    def infers(self, like: Sequence[Tensor], result: Tensor) -> bool:
        """Whether a result of a call in inference mode is an inference tensor: with new memory it always is."""
        shared = (t for t, x in zip(self.tensors, like) if storage(x) == storage(result))
        return next((t.is_inference() for t in shared), True)


def _views_are_marked() -> bool:
    with torch.no_grad():
        return torch.ones(1, requires_grad=True).view(1).requires_grad


MARKED = _views_are_marked()
DETACHING = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


def of_the_form(tensor: Tensor, inference: bool) -> Tensor:
    """An empty tensor with the same layout. Under a FakeTensorMode it takes no memory."""
    shape, stride, dtype, grad, offset, _, _ = TensorLayout.of(tensor)
    with torch.inference_mode(inference):
        meta = torch.empty_strided(shape, stride, dtype=dtype, device=tensor.device)
        if offset:
            held = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride))
            meta = torch.empty(held, dtype=dtype, device=tensor.device).as_strided(shape, stride, offset)
        return meta.requires_grad_() if grad else meta


def weakly(value: object | None) -> weakref.ref | None:
    return None if value is None else weakref.ref(value)


@dataclass(eq=False)
class SharedLogits:
    """What all tensors share that are made of one returned tensor."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    members: list[weakref.ref] = field(default_factory=list)
    # the checkpointed region that returned the tensor
    checkpoint: weakref.ref | None = field(default_factory=lambda: weakly(checkpoint()))
    built_for: str = ""  # why the logits were built without being asked for
    # FSDP2's hooks, which gather weights: they run before any gradient of a tensor made of the logits
    gathering: list[Callable[[Tensor], Any]] = field(default_factory=list)
    gradient_bypassed: bool = False  # True once a fused loss was taken: its gradient goes to h and W directly

    def returned_in(self, region: object | None) -> bool:
        return self.checkpoint is not None and region is not None and self.checkpoint() is region

    def gather_before(self, result: Any) -> None:
        """Have FSDP2 gather the weights again when a gradient of ``result``, made of the leaves, is asked for."""
        if isinstance(result, Tensor) and result.requires_grad:
            for hook in self.gathering:
                result.register_hook(hook)

    def join(self, member: Tensor) -> None:
        if len(self.members) > 256:
            self.members = [m for m in self.members if m() is not None]
        self.members.append(weakref.ref(member))


@dataclass(eq=False)
class Snapshot:
    """Snapshot of an operand, by which a later write or other memory is noticed, and its name for the error."""

    source: Tensor  # of which the leaf is an alias; the leaf itself where it has no other name
    version: int
    address: int
    steps: Steps  # of optimizers: fused ones leave the version as it was
    name: str
    sample: Tensor | None = None  # the bits of some entries, on the CPU: a write through ``.data`` leaves no version

    def is_of(self, other: Snapshot) -> bool:
        """Whether both are of one tensor, which has not changed in between."""
        same = self.source is other.source and self.version == other.version and self.address == other.address
        return same and self.steps.since(other.steps) is None


@dataclass(eq=False)
class DeferredState:
    """State of one `DeferredLogits`: the program that computes it, its operands, and the statistics known of it."""

    graph_output: GraphOutput | None  # None inside a compiler
    program: CallProgram
    leaves: tuple[Tensor, ...]
    snapshots: tuple[Snapshot, ...]  # of the leaves, when the call was recorded
    recorded: RecordedCall  # the call that makes it ...
    part: int | None  # ... or one of its results
    shared: SharedLogits
    layout: TensorLayout
    # statistics by name, [N], rows in order, by how they were recorded
    statistics: dict[Recording, dict[str, Tensor]] = field(default_factory=dict)


def snapshot(tensor: Tensor, name: str = "an operand", source: Tensor | None = None) -> Snapshot:
    source = tensor if source is None else source
    version = 0 if tensor.is_inference() else tensor._version
    computed = not source.is_leaf and source._base is None  # its memory is no parameter's
    return Snapshot(source, version, tensor.data_ptr(), NO_STEPS if computed else steps(source), name)


def as_leaf(tensor: Tensor, name: str, mode: Mode) -> tuple[Tensor, Snapshot]:
    """A leaf for an operand: an alias of its memory, with the history that the operand has now under ``mode``.

    Later changes of the operand's ``requires_grad`` or history do not affect the leaf, as they do not affect what
    autograd has recorded. Both share one version counter.
    """
    if mode.grad and tensor.requires_grad:
        with torch.enable_grad():
            leaf = torch.ops.aten.alias.default(tensor)
    else:
        leaf = tensor.detach()
    before = snapshot(leaf, name, tensor)
    before.sample = sampled(leaf)
    return leaf, before


SAMPLED_ENTRIES = 32  # entries of an operand
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sampled(leaf: Tensor) -> Tensor | None:
    """The bits of some entries of an operand on the CPU. None on other devices, where reading them would wait."""
    if leaf.device.type != "cpu" or not leaf.is_contiguous() or not leaf.numel() or leaf.itemsize not in _BITS:
        return None
    with out_of_sight(), torch.no_grad():
        return leaf.detach().view(-1)[:: -(-leaf.numel() // SAMPLED_ENTRIES)].view(_BITS[leaf.itemsize]).clone()


def differs(leaf: Tensor, before: Snapshot) -> bool:
    if before.sample is None:
        return False
    with out_of_sight():
        return not torch.equal(before.sample, sampled(leaf))  # type: ignore[arg-type]


def check_fresh(state: DeferredState) -> None:
    """Raise StaleLogits if a leaf has changed since it was taken in."""
    for leaf, before in zip(state.leaves, state.snapshots):
        now = snapshot(leaf, before.name, before.source)
        freed = leaf.untyped_storage().nbytes() == 0 and leaf.numel() > 0
        moved, written = now.address != before.address, now.version != before.version
        stepped = not (freed or moved or written) and now.steps.written_since(before.steps)
        if not (freed or moved or written or stepped or differs(leaf, before)):
            continue
        how = (
            refuse(Stale.FREED) if freed or moved
            else refuse(Stale.WRITTEN, before=before.version, now=now.version) if written
            else refuse(Stale.STEPPED) if stepped
            else refuse(Stale.WRITTEN_UNSEEN)
        )  # fmt: skip
        raise StaleLogits(
            f"these logits were deferred, and {before.name}, which they are made of, {how} since the forward pass. "
            "Read them before that (for a weight: before optimizer.step()), or compile with "
            'options={"fusedhead.logits": "eager"} (FUSEDHEAD_LOGITS=eager), which computes logits at once.'
        )

"""Dry runs: runs one node on stand-ins of its inputs to see which inputs it writes and whether it draws random numbers.

The stand-ins have the same sizes, strides and dtype, and lie on the device "meta", whose kernels are those that fake
tensors run, at a tenth of the cost. A call that names a device, draws random numbers, creates tensors or has no such
kernel runs on fake tensors of its own device, in a separate fake mode; so does user code. Either way the graph's fake
values and symbolic sizes do not change. A write shows in the schemas of the dispatched ops (an argument marked
``(a!)`` is written), in the version counters of the stand-ins, and in a stand-in whose memory was swapped. Where a node
cannot be run this way there is no answer, and the caller assumes the worst.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fusedhead.compat import (
    BackwardCFunction,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    ShapeEnv,
    TorchDispatchMode,
    disable_current_modes,
    tree_leaves,
    tree_map_only,
)
from fusedhead.graph.aliases import NUMBERS, storage, value_of
from fusedhead.graph.dtensors import is_conversion
from fusedhead.graph.nodes import callee, hint, inputs
from fusedhead.graph.saved_tensor_hooks import unhooked
from fusedhead.graph.tracing import call_key

META = torch.device("meta")
RANDOM = torch.Tag.nondeterministic_seeded
UNKNOWN_LENGTH = 8  # the number used for a data-dependent size
# Ops that write to arguments which their schemas do not mark: op -> (the arguments, the flag that turns the write on).
RUNNING_STATISTICS = ("running_mean", "running_var")
UNMARKED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "aten::native_batch_norm": (RUNNING_STATISTICS, "training"),
    "aten::batch_norm": (RUNNING_STATISTICS, "training"),
    "aten::_batch_norm_impl_index": (RUNNING_STATISTICS, "training"),
    "aten::cudnn_batch_norm": (RUNNING_STATISTICS, "training"),
    "aten::miopen_batch_norm": (RUNNING_STATISTICS, "training"),
    "aten::instance_norm": (RUNNING_STATISTICS, "use_input_stats"),
    "aten::batch_norm_update_stats": (RUNNING_STATISTICS, ""),
    "aten::batch_norm_gather_stats": (RUNNING_STATISTICS, ""),
    "aten::batch_norm_gather_stats_with_counts": (RUNNING_STATISTICS, ""),
}


class Seen(NamedTuple):
    """The result of a dry run."""

    written: frozenset[int]  # the places, among ``read.inputs(node)``, of what was written
    elsewhere: bool = False  # whether the node wrote to memory that is not its argument's
    draws: bool = False  # whether random numbers were drawn
    backward: bool = False  # whether a result has a backward of user code


class Unlike(Exception):
    """Raised for a value that has no stand-in of the kind that is tried."""


def changed_arguments(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that a call writes to, by the op's schema and by the table of unmarked writes."""
    schema = op._schema
    unmarked, flag = UNMARKED.get(schema.name, ((), ""))
    arguments = {a.name: args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(schema.arguments)}
    if flag and arguments.get(flag) is False:
        unmarked = ()
    marked = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    # an op named as in place that marks no argument counts as writing to all: a name may prove a write, not its absence
    silent = not marked and schema.name.endswith("_") and not schema.name.endswith("__")
    for name in arguments if silent else (*(a.name for a in marked), *unmarked):
        if arguments[name] is not None:
            yield arguments[name]


class WriteWatch(TorchDispatchMode):
    """Records the storages that the running ops write to, and those that they allocate."""

    supports_higher_order_operators = True

    def __init__(self, on_meta: bool) -> None:
        super().__init__()
        self.on_meta = on_meta  # whether nothing may run on tensors of another device
        self.written: set[int] = set()
        self.allocated: set[int] = set()
        self.draws = False
        self.unread = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.on_meta and not stays_on_meta(func, args, kwargs):
            raise Unlike
        if isinstance(func, OpOverload):
            self.draws |= RANDOM in func.tags
            for argument in changed_arguments(func, args, kwargs):
                self.written |= storages_of(argument)
        else:
            self.unread = True
        result = func(*args, **kwargs)
        self.allocated |= storages_of(result)
        return result


def stays_on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call computes nothing: all its tensors are on "meta", its result too, and it draws no numbers."""
    devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    elsewhere = kwargs.get("device") is not None
    return devices == {META.type} and not elsewhere and isinstance(func, OpOverload) and RANDOM not in func.tags


def storages_of(value: Any) -> set[int]:
    return {at for at in map(storage, tree_leaves(value)) if at is not None}


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def concrete_number(value: Any) -> Any:
    """The hint of a number that may be symbolic."""
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return value.node.hint if value.node.has_hint() else type(value.node.pytype)(1)
    value_known = hint(value) if isinstance(value, torch.SymInt) else value
    if value_known is None:
        expression = value.node.expr
        value_known = int(expression.subs(dict.fromkeys(expression.free_symbols, UNKNOWN_LENGTH)))
    return value_known


def likeness(value: Any) -> Hashable:
    """The key that a stand-in for a value is built from. Raises Unlike."""
    if isinstance(value, Tensor):
        plain = type(value) in (FakeTensor, Tensor, torch.nn.Parameter) or isinstance(value, torch.nn.Parameter)
        if not plain or value.layout != torch.strided or value.is_quantized:
            raise Unlike
        sizes, strides = tuple(map(concrete_number, value.shape)), tuple(map(concrete_number, value.stride()))
        held = concrete_number(value.untyped_storage().nbytes()) // value.itemsize
        offset = concrete_number(value.storage_offset())
        return Tensor, sizes, strides, offset, held, value.dtype, value.device, wants(value)
    if isinstance(value, (list, tuple)):
        return list if isinstance(value, list) else tuple, tuple(map(likeness, value))
    if isinstance(value, NUMBERS) and not isinstance(value, (slice, torch.Generator, torch.nn.Module)):
        plain_number = concrete_number(value)
        return type(plain_number), plain_number
    raise Unlike


def wants(value: Tensor) -> bool:
    try:
        return value.requires_grad
    except RuntimeError:  # a view of memory that was written in another grad mode
        return True


def dry_run_device(likes: Any) -> torch.device | None:
    """The device of the first tensor among the keys of some values."""
    devices = (
        like[6] if like[0] is Tensor else dry_run_device(like[1]) for like in likes if like[0] in (Tensor, list, tuple)
    )
    return next((device for device in devices if device is not None), None)


def stand_in(like: Any, on: torch.device | None) -> Any:
    """A stand-in built from a key; ``on``: its device in place of the value's own."""
    if like[0] is Tensor:
        _, sizes, strides, offset, held, dtype, device, gradient = like
        device = on or device
        least = 1 + sum((n - 1) * s for n, s in zip(sizes, strides)) if 0 not in sizes else 0
        if offset or held > least:
            base = torch.empty(max(held, offset + least), dtype=dtype, device=device)
            tensor = base.as_strided(sizes, strides, offset)
        else:
            tensor = torch.empty_strided(sizes, strides, dtype=dtype, device=device)
        tensor = tensor.requires_grad_() if gradient else tensor
        return tensor.clone() if gradient and torch.is_grad_enabled() else tensor  # an inner tensor may be written
    if like[0] in (list, tuple):
        return like[0](stand_in(each, on) for each in like[1])
    return like[1]


def of_torch(target: Any) -> bool:
    """Whether a function belongs to PyTorch or Python and not to user code."""
    owner = getattr(target, "__self__", None)
    of = owner if isinstance(owner, type) else target
    module = getattr(of, "__module__", None) or type(of).__module__
    return module.partition(".")[0] in ("torch", "operator", "_operator", "builtins", "math")


def fake_mode() -> FakeTensorMode:
    """A separate fake mode."""
    return FakeTensorMode(shape_env=ShapeEnv())


@contextmanager
def isolated(theirs: bool) -> Iterator[None]:
    """Context without the modes that are active where the pass runs."""
    with ExitStack() as stack:
        stack.enter_context(disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(theirs))  # a function of user code may have a backward of its own
        if theirs:
            stack.enter_context(unhooked())
        yield


# Results for PyTorch's own functions, by function, constants and kinds of tensors. They never change.
FACTS: dict[Hashable, Seen | None] = {}
MOST_FACTS = 4096


def dry_run(node: Node) -> Seen | None:
    """The result of running a node; None where it cannot be run. Conversions of DTensors are known."""
    if is_conversion(node):
        return Seen(frozenset())
    try:
        likes = tuple(likeness(value_of(source)) for source in inputs(node))
    except Exception:  # a tensor class of user code may raise anything
        return None
    theirs = node.op == "call_function" and not of_torch(node.target)
    key = None if theirs else kind_of(node, likes)
    if key is None:
        return run(node, likes, theirs)
    if key not in FACTS:
        if len(FACTS) >= MOST_FACTS:
            FACTS.clear()
        FACTS[key] = seen = run(node, likes, theirs)
        return seen
    return FACTS.get(key)


def kind_of(node: Node, likes: Hashable) -> Hashable:
    """The key of a call that determines its effects; None where a constant is an object of user code."""
    try:
        call: Any = call_key(node)
        plain = all(not isinstance(x[0], type) or issubclass(x[0], NUMBERS) for x in call[3:])
        return (call, likes) if plain else None
    except TypeError:
        return None


def run(node: Node, likes: Sequence[Any], theirs: bool) -> Seen | None:
    if "functorch" in (getattr(node.target, "__module__", None) or ""):  # depends on the nodes around it
        return None
    for on in (META, None) if not theirs else (None,):
        try:
            with isolated(theirs):
                return watched(callee(node), node, likes, on, theirs)
        except Exception:
            continue
    return None


def watched(
    function: Callable[..., Any], node: Node, likes: Sequence[Any], on: torch.device | None, theirs: bool
) -> Seen | None:
    sources = inputs(node)
    with fake_mode() if on is None else nullcontext():
        values = [stand_in(like, on) for like in likes]
        tensors = [[leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in values]
        memory, versions = list(map(storages_of, tensors)), [[tensor._version for tensor in group] for group in tensors]
        device = (dry_run_device(likes) or torch.device("cpu")).type
        stand_ins = map_arg((node.args, node.kwargs), dict(zip(sources, values)).__getitem__)
        # comparing a symbol would add a guard
        args, kwargs = tree_map_only(SYMBOLIC, concrete_number, stand_ins)
        cast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with cast, WriteWatch(on is not None) as seen:
            result = function(*args, **kwargs)
    if seen.unread:
        return None
    bumped = [[tensor._version for tensor in group] != old for group, old in zip(tensors, versions)]
    swapped = [storages_of(group) != at for group, at in zip(tensors, memory)]
    written = {i for i, at in enumerate(memory) if bumped[i] or swapped[i] or at & seen.written}
    elsewhere = seen.written - seen.allocated - set().union(*memory)
    return Seen(frozenset(written), bool(elsewhere), seen.draws, theirs and has_own_backward((result, tensors)))


def has_own_backward(values: Any) -> bool:
    """Whether the autograd graph of some tensors contains a backward written in Python."""
    stack: list[Any] = [x.grad_fn for x in tree_leaves(values) if isinstance(x, Tensor) and x.grad_fn is not None]
    seen = set(stack)
    while stack:
        step = stack.pop()
        if isinstance(step, BackwardCFunction):
            return True
        fresh = {before for before, _ in step.next_functions if before is not None} - seen
        seen |= fresh
        stack += fresh
    return False

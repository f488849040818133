"""Runs one node on stand-ins of its inputs, to see which of them it writes to and whether it draws random numbers.

The stand-ins are fake tensors of the same sizes, strides, dtype and device, in a fake mode of their own: neither the
graph's fake values nor its symbolic sizes notice. Witnesses are the schemas of all ops that are dispatched (an argument
marked ``(a!)`` is written), the version counters of the stand-ins, and whether each still has its own memory. A
node that cannot be run so has no answer, and the caller expects the worst.
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
from fusedhead.graph.nodes import callee, hint, inputs
from fusedhead.graph.saved_tensor_hooks import unhooked
from fusedhead.graph.tracing import call_key

RANDOM = torch.Tag.nondeterministic_seeded
UNKNOWN_LENGTH = 8  # what stands for a size that only the data decide
# Ops that write to arguments which their schemas do not mark: to these, unless the flag is false.
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
    """What a run showed."""

    written: frozenset[int]  # the places, among ``read.inputs(node)``, of what was written
    elsewhere: bool = False  # whether memory was written that the node was not given
    draws: bool = False  # whether random numbers were drawn
    backward: bool = False  # whether a backward of somebody's own hangs on the results


class Unlike(Exception):
    """A value for which there is no stand-in."""


def changed_arguments(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments of a call that are written, by the op's schema and by what is known of it besides."""
    schema = op._schema
    unmarked, flag = UNMARKED.get(schema.name, ((), ""))
    arguments = {a.name: args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(schema.arguments)}
    if flag and arguments.get(flag) is False:
        unmarked = ()
    marked = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    # an op that is called as if it wrote, and does not say where: a name may accuse, and never acquits
    silent = not marked and schema.name.endswith("_") and not schema.name.endswith("__")
    for name in arguments if silent else (*(a.name for a in marked), *unmarked):
        if arguments[name] is not None:
            yield arguments[name]


class WriteWatch(TorchDispatchMode):
    """Notes the storages that the ops which run write to, and those that they make."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()
        self.made: set[int] = set()
        self.draws = False
        self.unread = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload):
            self.draws |= RANDOM in func.tags
            for argument in changed_arguments(func, args, kwargs):
                self.written |= storages_of(argument)
        else:
            self.unread = True
        result = func(*args, **kwargs)
        self.made |= storages_of(result)
        return result


def storages_of(value: Any) -> set[int]:
    return {at for at in map(storage, tree_leaves(value)) if at is not None}


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def concrete_number(value: Any) -> Any:
    """The number of this compilation for one that may be symbolic."""
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return value.node.hint if value.node.has_hint() else type(value.node.pytype)(1)
    value_known = hint(value) if isinstance(value, torch.SymInt) else value
    if value_known is None:
        expression = value.node.expr
        value_known = int(expression.subs(dict.fromkeys(expression.free_symbols, UNKNOWN_LENGTH)))
    return value_known


def likeness(value: Any) -> Hashable:
    """What a stand-in for a value is made of. Raises Unlike."""
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


def stand_in(like: Any) -> Any:
    """A fake value that is made like another, outside of any graph."""
    if like[0] is Tensor:
        _, sizes, strides, offset, held, dtype, device, gradient = like
        least = 1 + sum((n - 1) * s for n, s in zip(sizes, strides)) if 0 not in sizes else 0
        if offset or held > least:
            base = torch.empty(max(held, offset + least), dtype=dtype, device=device)
            tensor = base.as_strided(sizes, strides, offset)
        else:
            tensor = torch.empty_strided(sizes, strides, dtype=dtype, device=device)
        tensor = tensor.requires_grad_() if gradient else tensor
        return tensor.clone() if gradient and torch.is_grad_enabled() else tensor  # an inner tensor may be written
    if like[0] in (list, tuple):
        return like[0](map(stand_in, like[1]))
    return like[1]


def of_torch(target: Any) -> bool:
    """Whether a function is PyTorch's or Python's own, not somebody's."""
    owner = getattr(target, "__self__", None)
    of = owner if isinstance(owner, type) else target
    module = getattr(of, "__module__", None) or type(of).__module__
    return module.partition(".")[0] in ("torch", "operator", "_operator", "builtins", "math")


@contextmanager
def own_fake_mode(theirs: bool) -> Iterator[FakeTensorMode]:
    """A fake mode of its own: nothing that is active where the pass runs sees what is computed in it."""
    with ExitStack() as stack:
        stack.enter_context(disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(theirs))  # a function of theirs may bring a backward of its own
        if theirs:
            stack.enter_context(unhooked())
        yield FakeTensorMode(shape_env=ShapeEnv())


# What calls of PyTorch's own functions do, by function, constants and kinds of tensors: true for good.
FACTS: dict[Hashable, Seen | None] = {}
MOST_FACTS = 4096


def dry_run(node: Node) -> Seen | None:
    """What running a node shows, or None where it cannot be run."""
    try:
        likes = tuple(likeness(value_of(source)) for source in inputs(node))
    except Exception:  # somebody's tensor class may raise what it likes
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
    """What all there is to know of a call depends on; None where it has constants that are objects of somebody's."""
    try:
        call: Any = call_key(node)
        plain = all(not isinstance(x[0], type) or issubclass(x[0], NUMBERS) for x in call[3:])
        return (call, likes) if plain else None
    except TypeError:
        return None


def run(node: Node, likes: Sequence[Any], theirs: bool) -> Seen | None:
    if "functorch" in (getattr(node.target, "__module__", None) or ""):  # means nothing without what surrounds it
        return None
    try:
        with own_fake_mode(theirs) as mode:
            return watched(callee(node), node, likes, mode, theirs)
    except Exception:
        return None


def watched(
    function: Callable[..., Any], node: Node, likes: Sequence[Any], mode: FakeTensorMode, theirs: bool
) -> Seen | None:
    sources = inputs(node)
    with mode:
        values = [stand_in(like) for like in likes]
        tensors = [[leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in values]
        memory, versions = list(map(storages_of, tensors)), [[tensor._version for tensor in group] for group in tensors]
        device = next((tensor.device.type for group in tensors for tensor in group), "cpu")
        stand_ins = map_arg((node.args, node.kwargs), dict(zip(sources, values)).__getitem__)
        # a symbol would be asked for its value, and guarded
        args, kwargs = tree_map_only(SYMBOLIC, concrete_number, stand_ins)
        cast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with cast, WriteWatch() as seen:
            result = function(*args, **kwargs)
    if seen.unread:
        return None
    bumped = [[tensor._version for tensor in group] != old for group, old in zip(tensors, versions)]
    swapped = [storages_of(group) != at for group, at in zip(tensors, memory)]
    written = {i for i, at in enumerate(memory) if bumped[i] or swapped[i] or at & seen.written}
    elsewhere = seen.written - seen.made - set().union(*memory)
    return Seen(frozenset(written), bool(elsewhere), seen.draws, theirs and has_own_backward((result, tensors)))


def has_own_backward(values: Any) -> bool:
    """Whether what leads to some tensors has a backward that is written in Python."""
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

"""Writes the program of deferred logits into an fx graph, as Dynamo would have recorded it.

Leaves become placeholders with fake values, whose numbers of tokens are symbols unless they are to be exact.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusedhead.compat import ConstantSource, FakeTensorMode, enable_python_dispatcher
from fusedhead.deferred.call_program import CallStep, Leaf, Made, Mode, decode, modes
from fusedhead.graph.nodes import callee, fake


@dataclass(eq=False)
class Draft:
    """A graph under construction, with the node of every leaf and step."""

    graph: Graph
    leaves: list[Node]
    results: list[Any]
    shape_env: ShapeEnv | None
    mode: FakeTensorMode
    device: str  # type of the device of the leaves
    symbols: dict[str, tuple[int, int]] = field(default_factory=dict)  # where a symbolic size is found

    def node(self, ref: Leaf | Made) -> Any:
        if isinstance(ref, Leaf):
            return self.leaves[ref.at]
        result = self.results[ref.step]
        return result if ref.part is None else result[ref.part]

    def function(self, text: str, free: Iterable[str]) -> tuple[tuple[tuple[int, int], ...], Callable[..., Any]]:
        """An expression in symbolic sizes, as a function of sizes of leaves; (leaf, dimension) of its arguments.

        Raises KeyError for a symbol that no leaf has.
        """
        names = sorted(free)
        return tuple(self.symbols[name] for name in names), eval(f"lambda {', '.join(names)}: {text}", {"math": math})


def fake_leaf(tensor: Tensor, at: int, draft: Draft, exact: frozenset[int], grad: bool) -> Tensor:
    """A fake tensor like a leaf, its sizes symbols where they are not exact."""
    sizes: Sequence[Any] = tensor.shape
    strides: Sequence[Any] = tensor.stride()
    if draft.shape_env is not None:
        free = [DimDynamic.STATIC if n in exact else DimDynamic.DUCK for n in tensor.shape]
        like = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device="meta")
        sizes, strides, _ = draft.shape_env.create_symbolic_sizes_strides_storage_offset(
            like, ConstantSource(f"leaf{at}"), symbolic_context=StatelessSymbolicContext(dynamic_sizes=free)
        )
        for d, size in enumerate(sizes):
            if isinstance(size, torch.SymInt):
                draft.symbols.setdefault(str(size.node.expr), (at, d))
    with draft.mode:
        leaf = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
    return leaf.requires_grad_() if grad and tensor.requires_grad else leaf


def append_call(draft: Draft, op: str, target: Any, args: tuple, kwargs: dict, mode: Mode) -> Node:
    node = draft.graph.create_node(op, target, args, kwargs)
    fakes = torch.fx.node.map_arg((args, kwargs), fake)
    with modes(mode.read, draft.device), draft.mode, enable_python_dispatcher():  # as Dynamo does: no size is pinned
        node.meta["example_value"] = callee(node)(*fakes[0], **fakes[1])
    return node


def dynamo_spelling(func: Callable[..., Any]) -> tuple[str, Any, tuple]:
    """A function as Dynamo writes it: (node op, target, arguments put after the first)."""
    name = getattr(func, "__name__", "")
    owner = getattr(func, "__self__", None)
    if name == "__get__" and owner is not None:
        return "call_function", builtins.getattr, (owner.__name__,)
    if func is Tensor.__getitem__:
        return "call_function", operator.getitem, ()
    if getattr(Tensor, name, None) is func:
        return "call_method", name, ()
    return "call_function", func, ()


def append_step(draft: Draft, step: CallStep, mode: Mode) -> Any:
    """Append a step: its node, or the list of nodes of its parts."""
    args, kwargs = decode(step.args, draft.node), decode(step.kwargs, draft.node)
    if isinstance(step.func, GraphModule):
        return inline_program(draft, step.func, args, step.mode)
    op, target, more = dynamo_spelling(step.func)
    args = (*args[:1], *more, *args[1:]) if more else tuple(args)
    node = append_call(draft, op, target, args, kwargs, step.mode)
    value = fake(node)
    cut = mode.grad and not step.mode.grad
    if isinstance(value, Tensor):
        return append_call(draft, "call_method", "detach", (node,), {}, step.mode) if cut else node
    if not isinstance(value, (tuple, list)) or not all(isinstance(v, Tensor) for v in value):
        return node
    parts = [append_call(draft, "call_function", operator.getitem, (node, i), {}, step.mode)
             for i in range(len(value))]  # fmt: skip
    return [append_call(draft, "call_method", "detach", (p,), {}, step.mode) for p in parts] if cut else parts


def inline_program(draft: Draft, program: GraphModule, args: Sequence[Any], mode: Mode) -> Node:
    """The nodes that make the returned logits."""
    operands, env = iter(args), {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(operands)
        elif node.op == "output":
            return env[node.args[0]]
        else:
            a, k = torch.fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = append_call(draft, node.op, node.target, a, k, mode)
    raise AssertionError("a graph has an output")


def draft(steps: Sequence[CallStep], leaves: Sequence[Tensor], exact: frozenset[int] | None, mode: Mode) -> Draft:
    """The graph of a program, with fake values; ``exact`` None makes all sizes constants."""
    env = None if exact is None else ShapeEnv()
    fake_mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=False)
    result = Draft(Graph(), [], [], env, fake_mode, leaves[0].device.type)
    for at, tensor in enumerate(leaves):
        node = result.graph.placeholder(f"leaf{at}")
        node.meta["example_value"] = fake_leaf(tensor, at, result, exact or frozenset(), mode.grad)
        result.leaves.append(node)
    for step in steps:
        result.results.append(append_step(result, step, mode))
    return result

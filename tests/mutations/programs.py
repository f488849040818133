"""Programs in which an op writes to what a head reads, as the graphs that Dynamo would make of them.

    h = x * 1.0; z = linear(h, w, b).masked_fill(m, -3.0); ...; loss = cross_entropy(z, y)

The op's argument is memory of h, of w, of b, of m or of y, seen through views that give it the shape and the dtype that
the op wants. Each graph is run as it is and with the pass, and everything it returns or writes to is compared.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from fusedhead.backend import run_pass
from fusedhead.graph.effects import effects, nodes_written
from fusedhead.graph.nodes import callee
from fusedhead.graph.recipes import compute_now
from fusedhead.options import Options
from tests.mutations.calls import Call, copied

N, D, V = 32, 32, 512
OPERANDS = ("h", "w", "b", "m", "y")
MODULES = (torch, F, torch._C._nn, torch.linalg, torch.special, torch.fft)
DUNDERS = {"add": "iadd", "sub": "isub", "mul": "imul", "div": "itruediv", "floor_divide": "ifloordiv", "pow": "ipow",
           "remainder": "imod", "bitwise_and": "iand", "bitwise_or": "ior", "bitwise_xor": "ixor",
           "__lshift__": "ilshift", "__rshift__": "irshift"}  # fmt: skip


@dataclass(frozen=True)
class Spelling:
    """One way to write a call: a node's ``op`` and ``target``, and how arguments are laid out for it."""

    name: str
    op: str
    target: Any
    laid_out: Callable[[Sequence[Any], dict[str, Any]], tuple[Sequence[Any], dict[str, Any]]] = lambda a, k: (a, k)


def out_as_one(names: Sequence[str]) -> Callable[..., Any]:
    """Several outputs under the one name ``out``."""

    def laid_out(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        outs = [kwargs[name] for name in names]
        rest = {k: v for k, v in kwargs.items() if k not in names}
        return args, {**rest, "out": outs[0] if len(outs) == 1 else tuple(outs)}

    return laid_out


def spellings(call: Call) -> Iterator[Spelling]:
    """Every way that a program may write a call."""
    schema = call.op._schema
    bare, outs = schema.name.split("::")[1], [a.name for a in schema.arguments if a.is_out]
    yield Spelling("overload", "call_function", call.op)
    yield Spelling("packet", "call_function", call.op.overloadpacket)
    if outs:
        base = bare.removesuffix("_out")
        for module in MODULES:
            for name in {base, base.partition("_")[2] if module is not torch else base}:
                if name and callable(getattr(module, name, None)):
                    yield Spelling(f"{module.__name__}, out=", "call_function", getattr(module, name), out_as_one(outs))
        return
    if schema.arguments and schema.arguments[0].name == "self":
        if hasattr(Tensor, bare) and str(schema.arguments[0].type) == "Tensor":
            yield Spelling("method", "call_method", bare)
        stem = bare.removesuffix("_") if not bare.startswith("__") else bare
        short = DUNDERS.get(stem, stem.strip("_") if bare.startswith("__i") else None)
        if short and hasattr(operator, short):
            plain = lambda args, kwargs: (args[:2], {})  # noqa: E731
            yield Spelling("operator", "call_function", getattr(operator, short), plain)
            if hasattr(Tensor, f"__{short}__"):
                yield Spelling("dunder", "call_method", f"__{short}__", plain)
        function = getattr(F, bare.removesuffix("_"), None)
        if callable(function) and bare.endswith("_") and not bare.startswith("_"):
            inplace = lambda args, kwargs: (args, {**kwargs, "inplace": True})  # noqa: E731
            yield Spelling("inplace=", "call_function", function, inplace)
    for module in MODULES:
        if callable(getattr(module, bare, None)):
            yield Spelling(module.__name__, "call_function", getattr(module, bare))


@dataclass(eq=False)
class Program:
    """A graph, the inputs it is run on, and the node that writes."""

    gm: GraphModule
    inputs: list[Tensor]
    writer: Node
    target: Node  # the argument that it writes to
    operand: str
    losses: int


class NoProgram(Exception):
    """A call that cannot be spelt so, or whose argument the operand has no room for."""


def inputs_of(learning: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(N, D, requires_grad=learning)
    numbers = {"x": x, "w": torch.randn(V, D) * 0.5, "b": torch.randn(V)}
    return {**numbers, "m": torch.rand(V) > 0.8, "y": torch.randint(0, V, (N,))}


@dataclass(eq=False)
class Writer:
    """Builds one program."""

    graph: Graph = field(default_factory=Graph)
    inputs: list[Tensor] = field(default_factory=list)

    def given(self, name: str, value: Tensor) -> Node:
        node = self.graph.placeholder(name)
        self.inputs.append(value)
        return node

    def seen_as(self, node: Node, held: Tensor, like: Tensor) -> Node:
        """The memory of an operand as a tensor of another shape and dtype."""
        call = self.graph.call_method
        if like.shape == held.shape and like.dtype == held.dtype:
            return node
        size = like.numel() * like.itemsize
        if size > held.numel() * held.itemsize or (held.dtype == torch.bool) != (like.dtype == torch.bool):
            raise NoProgram
        if held.dtype == torch.int64 and like.dtype != torch.int64:
            raise NoProgram
        flat = call("view", (node, -1))
        flat = call("view", (flat, like.dtype)) if like.dtype != held.dtype else flat
        piece = self.graph.call_function(operator.getitem, (flat, slice(0, like.numel())))
        return call("view", (piece, tuple(like.shape)))


def program(call: Call, spelling: Spelling, target: str, operand: str, learning: bool, after: bool) -> Program:
    """A program in which ``call`` writes, by its argument ``target``, to memory of ``operand``. Raises NoProgram.

    ``learning``: with a gradient for h and none for the weight. ``after``: the op is run when the loss has been taken.
    """
    result = Writer()
    numbers = inputs_of(learning)
    nodes = {name: result.given(name, value) for name, value in numbers.items()}
    extra: dict[int, Node] = {}
    arguments = copied(call.arguments)
    last = [x for x in tree_leaves(arguments[target]) if isinstance(x, Tensor)][-1:]
    if not last:
        raise NoProgram
    for i, tensor in enumerate(x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x is not last[0]):
        extra[id(tensor)] = result.given(f"extra_{i}", tensor)
    graph = result.graph
    nodes["h"] = graph.call_function(operator.mul, (nodes["x"], 1.0))
    z = graph.call_function(F.linear, (nodes["h"], nodes["w"], nodes["b"]))
    z = graph.call_method("masked_fill", (z, nodes["m"], -3.0))

    def loss() -> Node:
        return graph.call_function(F.cross_entropy, (z, nodes["y"]))

    def write() -> Node:
        held = nodes[operand]
        if learning and operand == "h":
            held = graph.call_method("detach", (held,))
        seen = result.seen_as(held, numbers["x" if operand == "h" else operand], last[0])
        place = {**extra, id(last[0]): seen}
        as_nodes = tree_map(lambda x: place[id(x)] if isinstance(x, Tensor) else x, arguments)
        args, kwargs = spelling.laid_out(*call.split(as_nodes))
        made_target.append(seen)
        return graph.create_node(spelling.op, spelling.target, tuple(args), dict(kwargs))

    made_target: list[Node] = []
    first = [loss()] if after or operand == "y" else []
    writer = write()
    second = [] if after else [loss()]
    graph.output((*first, *second, nodes["h"]))
    try:
        gm = GraphModule(torch.nn.Module(), graph)
    except SyntaxError as error:  # aten.random_.from
        raise NoProgram("its name is no name in Python") from error
    return Program(gm, result.inputs, writer, made_target[0], operand, len(first + second))


def with_values(result: Program, learning: bool) -> None:
    """Give every node the fake value that Dynamo would have recorded. Raises NoProgram."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs = iter(result.inputs)
    values: dict[Node, Any] = {}
    try:
        with mode, torch.set_grad_enabled(learning), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for node in result.gm.graph.nodes:
                if node.op == "placeholder":
                    values[node] = mode.from_tensor(next(inputs), static_shapes=True)
                elif node.target is F.cross_entropy:
                    values[node] = values[node.args[0]].sum()  # the same to a fake tensor, and cheaper
                elif node.op != "output":
                    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                    values[node] = callee(node)(*args, **kwargs)
                if node.op != "output" and values[node] is not None:
                    node.meta["example_value"] = values[node]
    except Exception as error:
        raise NoProgram(f"no fake kernel: {type(error).__name__}") from error


def run(function: Callable[..., Any], inputs: Sequence[Tensor], learning: bool) -> list[Any]:
    """Outputs, gradient and inputs afterwards; or the class of what was raised."""
    operands = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    torch.manual_seed(1)
    try:
        with torch.set_grad_enabled(learning), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = list(function(*operands))
            if learning:
                outputs += torch.autograd.grad(outputs[0], operands[0])
        return [x.detach() for x in (*outputs, *operands)]
    except Exception as error:
        return [type(error)]


def same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a is b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)


@dataclass(frozen=True)
class Verdict:
    """``kind``: "right", "wrong", "error" of the pass, "unseen" write. ``telling``: whether a late read would show."""

    kind: str
    detail: str
    fused: bool
    telling: bool
    exact: bool  # whether the node was found out about, and not just held to write to all it is given


def judged(result: Program, learning: bool) -> Verdict:
    """What the pass makes of a program. Raises NoProgram."""
    before = run(result.gm.forward, result.inputs, learning)
    if isinstance(before[0], type):
        raise NoProgram(f"raises {before[0].__name__} in eager code")
    with_values(result, learning)
    seen = result.target in nodes_written(result.writer)
    with torch.set_grad_enabled(learning):
        gm, report, wrap = run_pass(result.gm, Options(min_logits=0, logits="eager"), texts=False)
    got = run(wrap(gm, compute_now), result.inputs, learning)
    if not all(map(same, run(result.gm.forward, result.inputs, learning), before)):
        raise NoProgram("leaves memory as it happens to be, and eager code differs from itself")
    known = any(head.fused for head in report.heads), telling_of(result, before), effects(result.writer).sure
    if report.errors:
        return Verdict("error", report.errors[0], *known)
    if len(got) != len(before) or not all(map(same, got, before)):
        return Verdict("wrong", f"{got[:2]} for {before[:2]}", *known)
    return Verdict("unseen" if known[1] and not seen else "right", "", *known)


def telling_of(result: Program, before: Sequence[Any]) -> bool:
    """Whether the operand is another one afterwards."""
    if result.operand == "h":
        return not same(before[result.losses], result.inputs[0].detach() * 1.0)
    at = OPERANDS.index(result.operand)
    return not same(before[-len(result.inputs) + at], result.inputs[at])

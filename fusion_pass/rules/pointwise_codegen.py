"""The code of a pointwise op and of its derivative, generated from torch's own decompositions.

The op is traced with its gradient, as autograd defines it (at corners and ties too), and decomposed into ``prims``;
an op outside of the language of `kernels.transform.pointwise` is an `Escape`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fusedhead.compat import decomposition_table, unset_fake_temporarily
from fusedhead.graph.reasons import Escape
from fusedhead.kernels.transform import native
from fusedhead.kernels.transform.pointwise import OPS, Code, Function, Instruction, Op, run
from fusedhead.rules.reasons import NoRule

aten, prims = torch.ops.aten, torch.ops.prims
SAME = (prims.view_of.default, aten.clone.default, prims.clone.default, prims.convert_element_type.default)
FILL_ARGUMENT = {aten.scalar_tensor.default: 0, aten.full.default: 1, aten.full_like.default: 1}
CORNERS = (-3.0, 0.0, 3.0, 6.0)  # tried for ops whose corners are none of their constants
LARGEST_POWER = 8
LARGEST = 64  # instructions; no op of torch takes more, and a kernel is compiled for each chain


class SourceWriter:
    """Writes instructions, each distinct one once."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []

    def __call__(self, op: str, *args: str | float) -> str:
        if op not in OPS:
            raise Escape(NoRule.NO_KERNEL_FUNCTION, op=op)
        instruction = Instruction(op, tuple(float(a) if not isinstance(a, str) else a for a in args))
        if instruction not in self.instructions:
            self.instructions.append(instruction)
        return f"#{self.instructions.index(instruction)}"

    def power(self, x: str | float, exponent: Any) -> str | float:
        """x to an exponent that is a multiple of a half, by products and square roots."""
        halves = 2 * exponent if isinstance(exponent, (int, float)) else 0.5
        if halves != int(halves) or abs(halves) > 2 * LARGEST_POWER:
            raise Escape(NoRule.NO_KERNEL_POWER, exponent=exponent)
        whole, half = divmod(abs(int(halves)), 2)
        factors: list[str | float] = [x] * whole
        if half:
            factors = [*factors, self("sqrt", x)]
        if whole and half:  # pow gives 0 and inf for -0 and -inf, where sqrt gives -0 and nan
            factors = [self("abs", factor) for factor in factors]
        result = factors[0] if factors else 1.0
        for factor in factors[1:]:
            result = self("mul", result, factor)
        if whole and half:
            result = self("where", self("eq", x, -math.inf), math.inf, result)
        return self("reciprocal", result) if halves < 0 else result


def write_code(result: Node, names: dict[str, str]) -> Code:
    """The code of one result of a traced graph, whose placeholders have these names."""
    writer = SourceWriter()
    words: dict[Node, Any] = {}
    for node in result.graph.nodes:
        if node.op == "placeholder":
            words[node] = names[node.name]
        elif node.op == "call_function":
            words[node] = word_of(node, [words.get(a) if isinstance(a, Node) else a for a in node.args], writer)
    return without_unused(Code(tuple(writer.instructions), str(words[result])))


def word_of(node: Node, args: list[Any], writer: SourceWriter) -> Any:
    """The word for a node's result in the code, given those for its arguments: a name or a number."""
    if node.target is prims.empty_strided.default:
        return None  # only its shape is read
    if node.target in SAME:
        return args[0]
    if node.target in FILL_ARGUMENT:
        return float(args[FILL_ARGUMENT[node.target]])
    if node.target is aten.copy_.default:
        return args[1]
    name = str(node.target).split(".")[1] if node.target.namespace == "prims" else str(node.target)
    if name == "pow":
        return writer.power(*args)
    if name in ("mul", "div") and args[1] == 1.0:
        return args[0]
    return writer(name, *args)


def without_unused(code: Code) -> Code:
    """The code without what its result does not read."""
    needed: set[str] = set()
    stack: list[str | float] = [code.result]
    while stack:
        word = stack.pop()
        if isinstance(word, str) and word[0] == "#" and word not in needed:
            needed.add(word)
            stack += code.instructions[int(word[1:])].args
    if len(needed) > LARGEST:
        raise Escape(NoRule.LONG_FUNCTION, count=len(needed), most=LARGEST)
    kept = [i for i in range(len(code.instructions)) if f"#{i}" in needed]
    place = {f"#{old}": f"#{new}" for new, old in enumerate(kept)}
    moved = (
        Instruction(op, tuple(place.get(a, a) if isinstance(a, str) else a for a in args))
        for op, args in (code.instructions[i] for i in kept)
    )
    return Code(tuple(moved), place.get(code.result, code.result))


def native_op(op: Any, args: tuple, kwargs: tuple[tuple[str, Any], ...], which: int, gradient: Code) -> Op | None:
    """The op by its name and constants, where the torch engine has kernels for it with this gradient."""
    if which != 0:
        return None
    by_name = dict(zip((a.name for a in op._schema.arguments), args)) | dict(kwargs)
    constants = [by_name.get(a.name, a.default_value) for a in op._schema.arguments[1:]]
    if any(isinstance(a, str) and a not in ("none", "tanh") for a in constants):  # a vector
        return None
    numbers = tuple(float(a) if isinstance(a, (int, float)) else a for a in constants)
    ops = (Op(name, numbers) for name in native.names(op._schema.name.removeprefix("aten::")))
    return next((op for op in ops if slopes_agree(op, gradient)), None)


def slopes_agree(op: Op, gradient: Code) -> bool:
    """Whether the torch engine's gradient of an op is this code's, at and beside constants, where ops have corners.

    The derivative at a corner differs between releases of torch, and the code has that of the installed one.
    """
    at = (*CORNERS, *(a for a in op.args if isinstance(a, float)))
    corners = torch.tensor(at, dtype=torch.float32, device="cpu").clamp(-1e4, 1e4)
    z = torch.stack([corners - 1, corners, corners + 1])
    g, none = torch.ones_like(z), z[:0]
    theirs = native.NATIVE[op.op].gradient(g, z, *op.args)
    return torch.allclose(theirs, run(gradient, z, none, none, g), rtol=1e-3, atol=1e-5)


@lru_cache(maxsize=256)
def function_of(op: Callable[..., Tensor], args: tuple, kwargs: tuple[tuple[str, Any], ...], which: int) -> Function:
    """The function that ``op(*args, **kwargs)`` is of its argument number ``which``.

    Operands that are tensors are given by their names in the code ("c0", "r1"); all others are numbers.
    Raises Escape where the language has no words for it.
    """
    names = [a for i, a in enumerate(args) if isinstance(a, str) and i != which]

    def both(z: Tensor, g: Tensor, *vectors: Tensor) -> Sequence[Tensor]:
        values = iter(vectors)
        z = z.detach().requires_grad_()
        inputs = [z if i == which else next(values) if isinstance(a, str) else a for i, a in enumerate(args)]
        value = op(*inputs, **dict(kwargs))
        return value.detach(), torch.autograd.grad(value, z, g)[0]

    exact = torch.autocast("cpu", enabled=False)
    with unset_fake_temporarily(), torch.inference_mode(False), torch.enable_grad(), exact:
        tensors = [torch.ones(2, device="cpu", dtype=torch.float32) for _ in range(2 + len(names))]
        graph = make_fx(both, decomposition_table=decomposition_table)(*tensors).graph  # type: ignore[arg-type]
        placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
        words = dict(zip(placeholders, ("z", "g", *names)))
        value, gradient = (write_code(result, words) for result in graph.output_node().all_input_nodes)
        return Function(value, gradient, native_op(op, args, kwargs, which, gradient))

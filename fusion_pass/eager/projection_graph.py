"""The Dynamo graph of one eager projection, ``F.linear(h, w, b)``, built by hand for the pass.

The sizes before the last are symbols, as Dynamo makes them of sizes that change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from fusedhead.compat import ConstantSource, FakeTensorMode, ShapeEnv, enable_python_dispatcher
from fusedhead.legality.reasons import Illegal
from fusedhead.legality.sharding import FREED

STATIC_SIZES = (0, 1)  # a size that is 1 once is another graph


@dataclass(frozen=True)
class Named:
    """The source of an input: its name for users, as Dynamo's sources hold it."""

    name: str


def leading(operand: Tensor) -> list[int]:
    """The places of the sizes that are symbols."""
    return [d for d, n in enumerate(operand.shape[:-1]) if n not in STATIC_SIZES]


def arguments(operands: Sequence[Tensor | None]) -> list[Any]:
    """The inputs of the graph: the sizes of the hidden states that are symbols, and the operands that are there."""
    hidden = operands[0]
    assert hidden is not None
    return [*(hidden.shape[d] for d in leading(hidden)), *(x for x in operands if x is not None)]


def fake_of(mode: Any, operand: Tensor, symbolic: Sequence[int]) -> Tensor:
    """A fake of an operand, as if it were contiguous: what the pass does depends on no stride."""
    sizes = [DimDynamic.DYNAMIC if d in symbolic else DimDynamic.STATIC for d in range(operand.ndim)]
    shell = torch.empty(operand.shape, dtype=operand.dtype, device="meta")
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    shape = mode.from_tensor(shell, symbolic_context=context, source=ConstantSource("input")).shape
    with mode:
        return torch.empty(shape, dtype=operand.dtype, device=operand.device).requires_grad_(operand.requires_grad)


def graph_of(
    operands: Sequence[Tensor | None], path: str, kind: type, trace: str, freed: Illegal | None = None
) -> tuple[GraphModule, ShapeEnv]:
    """The graph of ``F.linear(*operands)`` in the current modes, and the shape environment of its symbols.

    Its inputs are `arguments`. ``path`` and ``kind`` are the module's; ``trace`` names the program's lines as a
    traceback does. ``freed``: why the weight is freed after the module has run.
    """
    graph, shapes = Graph(), ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=shapes)
    hidden = operands[0]
    assert hidden is not None
    with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
        fakes = [
            x if x is None else fake_of(mode, x, leading(hidden) if at == 0 else ()) for at, x in enumerate(operands)
        ]

    def placeholder(name: str, value: Any, source: str) -> Node:
        node = graph.placeholder(name)
        node.meta = {"example_value": value, FREED: freed}
        node._dynamo_source = Named(source)  # type: ignore[attr-defined]
        return node

    for at, d in enumerate(leading(hidden)):
        placeholder(f"s{at}", fakes[0].shape[d], f"L['s{at}']")  # type: ignore[union-attr]
    module = "L['self']" + "".join(f"._modules['{part}']" for part in path.split(".") if part)
    sources = ("L['input']", f"{module}._parameters['weight']", f"{module}._parameters['bias']")
    names = ("input", "weight", "bias")
    nodes = [placeholder(n, x, source) for n, x, source in zip(names, fakes, sources) if x is not None]
    product = graph.call_function(F.linear, tuple(nodes))
    with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()), enable_python_dispatcher(), mode:
        value = F.linear(*fakes)  # type: ignore[arg-type]
    product.meta = {
        "example_value": value,
        "stack_trace": trace,
        "nn_module_stack": {"head": (f"L['self'].{path}" if path else "L['self']", kind)},
    }
    graph.output((product,))
    return GraphModule(torch.nn.Module(), graph), shapes

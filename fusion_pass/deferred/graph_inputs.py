"""Deferred logits as inputs of another compiled graph: the graph takes their sources instead.

A loss that is compiled on its own then holds the projection and the loss, and is fused like any other. Compilers
that do not know deferred logits see a traceable tensor subclass (`DeferredLogits.__tensor_flatten__`), which
computes the logits in their graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusedhead.compat import AttrSource, maybe_get_fake_mode
from fusedhead.deferred.call_program import Mode
from fusedhead.deferred.state import check_fresh
from fusedhead.deferred.tensor import DeferredLogits, compiling
from fusedhead.deferred.to_fx import Draft, append_step
from fusedhead.graph.nodes import fake
from fusedhead.graph.sizes import static

CompiledGraph = Callable[..., Any]


def leaves_of(tensor: DeferredLogits) -> list[Any]:
    """The tensors that replace a deferred tensor among the inputs of a graph.

    Raises StaleLogits, except while a graph is compiled: there it would look like an error of the compiler, and the
    call of the compiled graph raises it anyway.
    """
    if tensor._plain is None and tensor._deferred.graph_output is not None and not compiling():
        check_fresh(tensor._deferred)
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def expand_inputs(gm: GraphModule, inputs: Sequence[Any]) -> tuple[list[Any], Callable[[CompiledGraph], CompiledGraph]]:
    """Replace every placeholder of ``gm`` that is given deferred logits, in place.

    Returns the inputs of the new graph, and a function that makes a compiled one take the old inputs.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    deferred = [isinstance(value, DeferredLogits) for value in inputs]
    start = next(node for node in gm.graph.nodes if node.op != "placeholder")
    for node, value in zip(placeholders, inputs):
        if isinstance(value, DeferredLogits):
            graph_output = value._deferred.graph_output
            replace_placeholder(gm, node, leaves_of(value), start, graph_output.exact if graph_output else frozenset())
    gm.graph.lint()
    gm.recompile()

    def flat(values: Sequence[Any]) -> list[Any]:
        leaves: list[Any] = []
        for value, is_deferred in zip(values, deferred):
            leaves.extend(leaves_of(value) if is_deferred else [value])
        return leaves

    def wrap(compiled: CompiledGraph) -> CompiledGraph:
        def with_leaves(*values: Any) -> Any:
            for value, is_deferred in zip(values, deferred):
                state = value._deferred if is_deferred and value._plain is None else None
                made_by = None if state is None else state.graph_output
                for run in made_by.recipe.runs if made_by is not None else ():
                    run.passed.add()
            results = compiled(*flat(values))
            states = [z._deferred for z in values if type(z) is DeferredLogits]
            for shared in {id(state.shared): state.shared for state in states}.values():
                for result in results if shared.gathering else ():
                    shared.gather_before(result)
            return results

        return with_leaves

    return flat(inputs), wrap


def of_known_sizes(inner: Tensor, real: Tensor, exact: frozenset[int]) -> Tensor:
    """A fake tensor whose sizes in ``exact``, those of the head, are numbers, also where Dynamo made all symbols."""
    sizes = [int(s) if n in exact else s for s, n in zip(inner.shape, real.shape)]
    strides = [s if static(s) is None else int(s) for s in inner.stride()]
    if all(type(s) is int for s in inner.shape) or not any(type(s) is int for s in sizes):
        return inner.detach()
    mode = maybe_get_fake_mode(inner)
    assert mode is not None
    with mode:
        return torch.empty_strided(sizes, strides, dtype=inner.dtype, device=inner.device)


def replace_placeholder(
    gm: GraphModule, node: Node, real: Sequence[Tensor], start: Node, exact: frozenset[int]
) -> None:
    """Replace a placeholder by placeholders for the sources of a deferred tensor, and its program before ``start``."""
    value = fake(node)
    names, (program, *_) = value.__tensor_flatten__()
    leaves = []
    with gm.graph.inserting_before(node):
        for name, tensor in zip(names, real):
            leaf = gm.graph.placeholder(f"{node.name}{name}")
            # Dynamo's fakes of inner tensors do not say whether a gradient is wanted
            inner = of_known_sizes(getattr(value, name), tensor, exact)
            leaf.meta = {"example_value": inner.requires_grad_(tensor.requires_grad)}
            leaf._dynamo_source = AttrSource(node._dynamo_source, name)  # type: ignore[attr-defined]
            leaves.append(leaf)
    mode = maybe_get_fake_mode(fake(leaves[0]))
    assert mode is not None
    draft_graph = Draft(gm.graph, leaves, [], mode.shape_env, mode, value.device.type)
    with gm.graph.inserting_before(start):
        for step in program.steps:
            draft_graph.results.append(append_step(draft_graph, step, Mode.now(draft_graph.device)))
        result = draft_graph.node(program.result)
    for later in gm.graph.nodes:
        if later.meta.get("example_value") is value:  # `float()` of float32 logits returned its argument
            later.meta["example_value"] = fake(result)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def any_deferred(inputs: Sequence[Any]) -> bool:
    return any(isinstance(value, DeferredLogits) for value in inputs) and not torch.compiler.is_exporting()

"""Deferred logits as outputs: the wrapper of a compiled graph makes them of the sources that the graph returns.

A compiled graph that returns logits returns hidden states instead, and its caller gets a `DeferredLogits` made of them.
Calls on it make further ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fusedhead.deferred.dispatch  # noqa: F401  the handler of calls on deferred logits
from fusedhead.compat import FakeTensor
from fusedhead.deferred.call_program import CallProgram, CallStep, Leaf, Made, Mode, encode, shapes
from fusedhead.deferred.gathered_weights import is_watched, sees_frees, wait_for
from fusedhead.deferred.history import with_grad_fn
from fusedhead.deferred.query import LEARNT
from fusedhead.deferred.reasons import BuiltAtOnce
from fusedhead.deferred.state import DeferredState, GraphOutput, RecordedCall, SharedLogits, StaleLogits, as_leaf
from fusedhead.deferred.surroundings import out_of_sight
from fusedhead.deferred.tensor import DeferredLogits, plain
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.graph.recipes import LEAST_TOKENS, Recipe, compute_now, has_gradient
from fusedhead.legality.profitability import rows_from
from fusedhead.legality.sharding import fsdp2_in_use, worth_a_copy

__all__ = ["DeferredLogits", "StaleLogits", "deferring", "on_plain_inputs", "plain"]


def hand_out(graph_output: GraphOutput, sources: Sequence[Any]) -> Tensor:
    """The deferred tensor of a recipe on these sources (tensors, and numbers for sizes)."""
    recipe = graph_output.recipe
    mode = Mode(has_gradient(recipe, sources), None, torch.is_inference_mode_enabled())
    tensor_sources = [s for s in sources if isinstance(s, Tensor)]
    operands = [as_leaf(tensor, name, mode) for tensor, name in zip(tensor_sources, recipe.names)]
    tensors, snapshots = tuple(leaf for leaf, _ in operands), tuple(snapshot for _, snapshot in operands)
    places = iter(range(len(tensors)))
    args, none = encode(tuple(sources), lambda _: Leaf(next(places))), encode({}, lambda _: Leaf(0))
    recorded = RecordedCall(recipe.program, args, none, tensors, mode)
    key, what = (args, mode, shapes(tensors, None)), (args, mode)
    entry = graph_output.recorded.get(key)
    if entry is None:
        layouts, _ = recorded.layouts()
        with graph_output.lock:
            if len(graph_output.recorded) > LEARNT:
                graph_output.recorded.clear()
            program = CallProgram((CallStep(recipe.program, args, none, mode),), Made(0))
            programs = graph_output.recorded.setdefault(what, ((program,), [], None))[0]
            entry = graph_output.recorded.setdefault(key, (programs, layouts, None))
    programs, (layout,), _ = entry
    if math.prod(layout.shape) < recipe.least:
        return build_now(recipe, sources, refuse(BuiltAtOnce.FEW_LOGITS))
    if not torch.is_grad_enabled() and math.prod(layout.shape) < LEAST_TOKENS * layout.shape[recipe.class_dim]:
        return build_now(recipe, sources, refuse(BuiltAtOnce.FEW_TOKENS, least=LEAST_TOKENS))
    sharded = fsdp2_in_use()
    if sharded and not (sees_frees() and all(map(is_watched, tensor_sources))):
        if not worth_a_copy(tensor_sources, layout.shape):
            return build_now(recipe, sources, refuse(BuiltAtOnce.LARGE_COPY))
        operands = [as_leaf(copied(tensor, mode), name, mode) for tensor, name in zip(tensor_sources, recipe.names)]
        tensors, snapshots = tuple(leaf for leaf, _ in operands), tuple(snapshot for _, snapshot in operands)
        recorded = RecordedCall(recipe.program, args, none, tensors, mode)
    for run in recipe.runs:
        run.deferred.add()
    state = DeferredState(graph_output, programs[0], tensors, snapshots, recorded, None, SharedLogits(), layout)
    if sharded:
        wait_for(state)
    return with_grad_fn(state)


def copied(tensor: Tensor, mode: Mode) -> Tensor:
    """A copy of an operand, with its gradient edge, for memory that may be freed without notice."""
    with out_of_sight(), torch.set_grad_enabled(mode.grad):
        return tensor.clone()


def build_now(recipe: Recipe, sources: Sequence[Any], why: Refusal) -> Tensor:
    for run in recipe.runs:
        run.at_once.add(str(why))
    return compute_now(recipe, sources)


def keep_source(source: Any) -> Any:
    """A source in memory that no later run overwrites: a parameter as it is, anything else copied."""
    return source.clone() if isinstance(source, Tensor) and not isinstance(source, torch.nn.Parameter) else source


def on_plain_inputs(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, called with plain tensors in place of deferred logits.

    For a graph that DDP cut out of a larger one: it may get the deferred logits of another part, and was compiled for
    a plain tensor.
    """

    def with_plain_tensors(*inputs: Any) -> Any:
        return compiled(*(plain(x) if isinstance(x, DeferredLogits) else x for x in inputs))

    return with_plain_tensors


def deferring(memory: int, overwrites: bool, min_logits: str | int = "auto") -> Callable[[Recipe, Sequence[Any]], Any]:
    """The function that makes deferred logits of the sources that a wrapped graph returns.

    ``memory`` is the workspace budget of the fused ops. With ``overwrites`` the graph's next run overwrites what it
    returned (CUDA graphs), so hidden states are copied. ``min_logits`` is the option of that name.
    """
    graph_outputs: dict[Recipe, GraphOutput] = {}

    def finish(recipe: Recipe, sources: Sequence[Any]) -> Any:
        if any(isinstance(s, FakeTensor) for s in sources):
            return compute_now(recipe, sources)
        graph_output = graph_outputs.get(recipe)
        if graph_output is None:
            least = rows_from(recipe.device, memory) if min_logits == "auto" else 0
            graph_output = graph_outputs.setdefault(recipe, GraphOutput(recipe, memory, least))
        return hand_out(graph_output, [keep_source(s) for s in sources] if overwrites else sources)

    return finish

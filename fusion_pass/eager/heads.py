"""Eager projections onto a vocabulary that return deferred logits: which calls do, and when a module stops.

A call that qualifies goes through the pass as the graph that Dynamo would make of it (`projection_graph`), once for
each kind of call. The gate, the record and the report are those of the pass. A module whose logits are read as numbers
is no head, or gains nothing: it stops, and the report names the reader.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from fusedhead.analysis.lone_heads import has_sizes_of_a_head
from fusedhead.backend import compile_graph
from fusedhead.compat import unusable
from fusedhead.eager.projection_graph import STATIC_SIZES, arguments, graph_of
from fusedhead.eager.surroundings import of_plain_tensors, plainly_eager
from fusedhead.functional.eager_linear import forward_with
from fusedhead.graph.recipes import LEAST_TOKENS
from fusedhead.graph.run_counts import LIBRARIES, Run
from fusedhead.legality.profitability import least_logits
from fusedhead.legality.reasons import Illegal
from fusedhead.legality.sharding import given_back_by
from fusedhead.options import split_options
from fusedhead.report import observers
from fusedhead.report.report import Report

log = logging.getLogger("fusedhead")
HEAD_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # their names are no part of a layer's name
# the attribute of the wrapped module in torch's wrappers: torch.compile, FSDP1, activation checkpointing
NAMES_OF_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# a kind of call is computed at once when its logits were built so many times more than answered: one look is no reason
MOST_BUILT = 2


@dataclass(eq=False)
class Calls:
    """One kind of call of one module: the function that makes it, and the counts of its logits."""

    compiled: Callable[..., Any] | None  # None where the pass does not fuse it
    runs: list[Run]
    stopped: str = ""

    def stops(self) -> str:
        """Why such calls are computed at once from now on, or ""."""
        if not self.stopped:
            for run in self.runs:
                built = run.built.total
                if built >= MOST_BUILT + run.answered.value + run.passed.value:
                    uses = ", ".join(dict.fromkeys(str(use) for use, _ in run.built.items()))
                    self.stopped = f"no longer deferred, since what reads them is no loss: {uses}"
        return self.stopped


@dataclass(eq=False)
class EagerHead:
    """The state of one module."""

    path: str | None  # its name in its model; None where it is not known
    kinds: dict[Any, Calls] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


HEADS: Any = WeakIdKeyDictionary()  # of every module that qualified once, or was given to `defer`
_everywhere: list[bool] = []  # not empty while `enable` is in force
_guard = threading.RLock()


def project_eagerly(module: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(input, weight, bias)``, deferred where this is exact and pays."""
    if torch.jit.is_tracing() or type(weight) not in (nn.Parameter, Tensor):  # a tracer's sizes are tensors
        return F.linear(input, weight, bias)
    if weight.ndim != 2 or not has_sizes_of_a_head(*weight.shape) or not (_everywhere or module in HEADS):
        return F.linear(input, weight, bias)
    if getattr(module, "_is_replica", False):  # of `nn.DataParallel`, a new one for every call
        return F.linear(input, weight, bias)
    logits = deferred_logits(lambda: HEADS.setdefault(module, EagerHead(None)), module, (input, weight, bias))
    return F.linear(input, weight, bias) if logits is None else logits


LinearOperands = tuple[Tensor, Tensor, "Tensor | None"]


def deferred_logits(head: Callable[[], EagerHead], module: nn.Module, operands: LinearOperands) -> Tensor | None:
    """Deferred logits for ``F.linear(*operands)``; None where they are not proved exact, or do not pay.

    ``head`` returns the record of the head; ``module`` owns the weight.
    """
    input, weight, bias = operands
    if not of_plain_tensors(input, weight, bias) or not plainly_eager():
        return None
    settings, _ = split_options(None)
    tokens = input.numel() // max(1, input.shape[-1])
    least = max(1, least_logits(weight.device.type, settings.min_logits))
    few = not torch.is_grad_enabled() and tokens < LEAST_TOKENS
    if settings.logits != "deferred" or tokens * weight.shape[0] < least or few:
        return None
    with _guard:
        eager_head = head()
    calls = calls_of(eager_head, module, operands, settings)
    why = calls.stops()
    if calls.compiled is None or why:
        for run in calls.runs if why else ():
            run.at_once.add(why)
        return None
    return calls.compiled(*arguments(operands))[0]


def calls_of(head: EagerHead, module: nn.Module, operands: LinearOperands, settings: Any) -> Calls:
    """The record of this kind of call, which the first one makes by the pass."""
    device = operands[1].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    shapes = tuple(n if n in STATIC_SIZES else -1 for n in operands[0].shape[:-1])
    of_operands = (None if x is None else (x.dtype, x.device, x.requires_grad) for x in operands)
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    freed = given_back_by(module, operands[1])
    kind = (settings, autocast, *modes, freed, shapes, operands[1].shape, *of_operands)
    calls = head.kinds.get(kind)
    if calls is None:
        with head.lock:
            calls = head.kinds.get(kind)
            if calls is None:
                calls = head.kinds[kind] = compiled(head, module, operands, settings, freed)
    return calls


def as_it_is(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
    """The graph, run by Python."""
    return gm.forward


@torch.compiler.disable
def compiled(
    head: EagerHead, module: nn.Module, operands: LinearOperands, settings: Any, freed: Illegal | None
) -> Calls:
    """Run the pass on a call's graph. An error leaves calls of this kind unchanged."""
    told: list[Report] = []

    def observe(report: Report) -> None:
        told.append(report)
        observers.notify(report)

    try:
        path = path_of(module) if head.path is None else head.path
        gm, shapes = graph_of(operands, path, type(module), program_lines(), freed)
        # below a function whose frame Dynamo has skipped, Dynamo would compile what this runs
        function = torch.compiler.disable(compile_graph(gm, arguments(operands), settings, as_it_is, observe))
        if shapes.guards:  # never seen: the pass asks nothing of a symbol
            log.warning("fusedhead: an eager projection depends on its sizes and stays as it is: %s", shapes.guards)
            return Calls(None, [])
    except Exception:
        if settings.strict:
            raise
        log.warning("fusedhead: an eager projection could not be read and stays as it is", exc_info=True)
        return Calls(None, [])
    fused = [record for report in told for record in report.heads if record.fused]
    return Calls(function if fused else None, [record.run for record in fused])


def program_lines() -> str:
    """The program's frames that are running, as a traceback names them, the outermost first."""
    frames = [f for f, _ in traceback.walk_stack(None) if library_of(f) not in LIBRARIES]
    return "".join(traceback.format_list(traceback.StackSummary.extract((f, f.f_lineno) for f in reversed(frames))))


def library_of(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def path_of(module: nn.Module) -> str:
    """The module's name in the outermost model that is running, "" where none is."""
    frames = [frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_argcount]
    running = [frame.f_locals.get(frame.f_code.co_varnames[0]) for frame in frames]
    modules = [m for m in running if issubclass(type(m), nn.Module) and not isinstance(m, HEAD_WRAPPERS)]
    for outer in reversed(modules):
        for name, inner in outer.named_modules():
            if inner is module:
                return without_wrappers(name)
    return ""


def without_wrappers(name: str) -> str:
    """A module's name as its model's author writes it."""
    return ".".join(part for part in name.split(".") if part not in NAMES_OF_WRAPPED)


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) for the layers in a module, itself included, that have the sizes of a head."""
    for name, inner in module.named_modules():
        if (
            isinstance(inner, nn.Linear)
            and type(inner).forward is nn.Linear.forward
            # the layer's sizes: the weight itself may be a shard
            and has_sizes_of_a_head(inner.out_features, inner.in_features)
        ):
            yield name, inner


def register_layers(layers: Iterable[tuple[str, nn.Linear]]) -> None:
    """Let layers defer; keys are their names in the model."""
    with _guard:
        for name, inner in layers:
            HEADS.setdefault(inner, EagerHead(without_wrappers(name)))


_installed: list[Any] = []  # torch's forward and ours, while ours is in its place


def install() -> None:
    """Put our forward in the place of `torch.nn.Linear`'s, once."""
    with _guard:
        if not _installed or nn.Linear.forward is not _installed[1]:
            original, ours = nn.Linear.forward, forward_with(project_eagerly)
            nn.Linear.forward = ours  # type: ignore[method-assign, assignment]
            _installed[:] = [original, ours]


def everywhere() -> Callable[[], None]:
    """Let every eager layer that qualifies defer. Returns the function that undoes it.

    Modules that were given to `defer` go on.
    """
    if why := unusable():
        raise RuntimeError(why)
    with _guard:
        install()
        _everywhere.append(True)

    def undo() -> None:
        with _guard:
            _everywhere.pop()
            for module in [m for m, head in HEADS.items() if head.path is None]:
                del HEADS[module]
            if not HEADS and not _everywhere and _installed and nn.Linear.forward is _installed[1]:
                nn.Linear.forward = _installed[0]  # type: ignore[method-assign]

    return undo

"""``fusedhead.estimate(fn)(*args)``: the memory and the least time of each head, before anything is compiled or
allocated.

``fn`` runs once on fake tensors, forward and backward, through Dynamo and the pass. The heads are those that a
compilation finds, and the three numbers of bytes are

    eager       the tensors of [N, V] that are alive together, watched while the graph ran op by op
    Inductor    the logits, in whose place it writes their gradient; with a gather, also the float32 gradient [N, V]
                that its backward scatters into
    fusedhead   the workspace that the planner takes on the chip

The time is a lower bound: that of the matrix products alone, at a measured rate of the chip (`report.rates`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from typing_extensions import Never

from fusedhead.analysis.cost import mebibytes
from fusedhead.backend import run_pass
from fusedhead.compat import FakeTensor, FakeTensorMode, tree_leaves, tree_map
from fusedhead.explain import misplaced
from fusedhead.fake_modules import fake_modules, faked, modules_of
from fusedhead.graph.reasons import refuse
from fusedhead.legality.profitability import MAY_HOLD, Unprofitable, least_logits
from fusedhead.live_bytes import LiveBytes, LiveSize
from fusedhead.options import Options, split_options
from fusedhead.report.estimates import itemsize
from fusedhead.report.head_record import HeadRecord
from fusedhead.report.rates import Chip, chip_named
from fusedhead.report.step_estimate import HeadEstimate, StepEstimate


class Estimator:
    """A Dynamo backend that compiles nothing: a graph goes through the pass and then runs op by op, while tensors are
    watched.
    """

    def __init__(self, chip: Chip, options: Options) -> None:
        self.chip, self.options = chip, options
        self.live = LiveBytes()
        self.records: list[HeadRecord] = []
        self.graphs = 0

    def __call__(self, gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        every = replace(self.options, min_logits=0, strict=False, debug=False)  # the gate is applied for the chip
        working, report, _ = run_pass(gm, every, texts=False)
        self.graphs += 1
        with planned_for(working, self.chip.device):
            self.records += [self.for_the_chip(head) for head in report.heads]
        for head in report.heads:
            self.live.watch(size_of(head))

        def run(*inputs: Any) -> Any:
            with self.live:
                return gm.forward(*inputs)

        return run

    def for_the_chip(self, head: HeadRecord) -> HeadRecord:
        """The record with the chip's workspace, left where the chip's limits say so."""
        on_chip = replace(head, device=self.chip.device)
        tokens = size_of(head).tokens
        logits = tokens * head.vocab_size
        if not head.fused:
            return on_chip
        if head.sizes is not None:
            bytes_logits, workspace = head.sizes(tokens)
            on_chip = replace(on_chip, bytes_logits=bytes_logits, workspace_bytes=workspace)
        least = least_logits(self.chip.device, self.options.min_logits)
        small = str(refuse(Unprofitable.FEW_LOGITS, logits=logits, least=least)) if logits < least else ""
        if reason := small or self.grows(on_chip):
            return replace(on_chip, fused=False, reason=reason, logits="built", engine="")
        return on_chip

    def grows(self, head: HeadRecord) -> str:
        """`profitability.grown`, for the chip."""
        if self.options.min_logits != "auto" or head.materialised or head.least:
            return ""
        if head.workspace_bytes <= MAY_HOLD.get(self.chip.device, 1.0) * head.bytes_logits:
            return ""
        held, logits = mebibytes(head.workspace_bytes), mebibytes(head.bytes_logits)
        return str(refuse(Unprofitable.GROWS, held=held, logits=logits))

    def estimate(self, head: HeadRecord) -> HeadEstimate:
        tokens = size_of(head).tokens
        logits = tokens * head.vocab_size
        operands = (tokens + head.vocab_size) * head.hidden_size * itemsize(head)
        scattered = logits * torch.float32.itemsize if head.gathers and not head.forward_only else 0
        rate = self.chip.flop_per_second.get(head.dtype)
        return HeadEstimate(
            head,
            bytes_eager=self.live.peak_of(size_of(head)),
            bytes_inductor=head.bytes_logits + scattered,
            bytes_fusedhead=head.bytes_held,
            bytes_gradients=0 if head.forward_only else operands,
            flop=head.flop,
            milliseconds=head.flop / rate * 1e3 if rate else None,
        )

    def result(self, stopped: str = "") -> StepEstimate:
        """One line a head: the first of several calls of one size."""
        first: dict[tuple[Any, ...], HeadRecord] = {}
        for head in self.records:
            first.setdefault((head.where, head.computes, str(head.tokens), head.vocab_size, head.fused), head)
        return StepEstimate(self.chip, [self.estimate(head) for head in first.values()], self.graphs, stopped)


def size_of(head: HeadRecord) -> LiveSize:
    """The size of the head's logits, whose number of tokens may be a symbol in the record."""
    tokens = head.bytes_logits // itemsize(head) // max(1, int(head.vocab_size))
    return LiveSize(tokens, int(head.hidden_size), int(head.vocab_size))


@contextmanager
def planned_for(gm: GraphModule, device: str) -> Iterator[None]:
    """Context in which the fake values of a graph have the device ``device``, which the planner reads.

    Nothing may be computed on them inside: this torch may not be built for the device.
    """
    values = {
        id(value): value
        for module in gm.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        for value in tree_leaves((node.meta.get("example_value"), node.meta.get("val")))
        if isinstance(value, FakeTensor)
    }
    before = [(value, value.fake_device) for value in values.values()]
    for value, _ in before:
        value.fake_device = torch.device(device)
    try:
        yield
    finally:
        for value, was in before:
            value.fake_device = was


def estimate(
    fn: Callable[..., Any], *misplaced_arguments: Never, chip: str | None = None, **compile_options: Any
) -> Callable[..., StepEstimate]:
    """A function that takes the arguments of ``fn`` and returns a `StepEstimate`.

    Arguments and parameters may lie on any device, on ``meta``, or be fake; none is read. ``chip``: a name of
    `fusedhead.report.rates`; the GPU of this machine where it is None, or an H100 where there is none.
    ``compile_options`` are those of ``torch.compile``. The scalars that ``fn`` returns are differentiated, or else
    all of its outputs.

    Raises TypeError where the function's own arguments are given here, ValueError for an unknown chip or option.
    """
    if wrong := misplaced("estimate", misplaced_arguments, compile_options):
        raise TypeError(wrong)
    target = getattr(fn, "_orig_mod", None) or getattr(fn, "_torchdynamo_orig_callable", fn)

    def estimated(*args: Any, **kwargs: Any) -> StepEstimate:
        passed = dict(compile_options)
        passed.pop("mode", None)
        options, _ = split_options(passed.pop("options", None))
        estimator = Estimator(chip_named(chip), options)
        stopped = ""
        with forget_sizes(), estimate_fake_mode() as mode, fake_modules(modules_of([target, args, kwargs]), mode):
            fakes, named = tree_map(lambda x: faked(x, mode), (args, kwargs))
            try:
                out = torch.compile(target, backend=estimator, **passed)(*fakes, **named)
                with estimator.live:
                    differentiate(out)
            except Exception as error:  # code after a graph may read numbers
                if not estimator.graphs:
                    raise
                stopped = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return estimator.result(stopped)

    return estimated


def forget_sizes() -> AbstractContextManager[Any]:
    """Context without Dynamo's memory of earlier sizes, so that each estimate is for its own sizes."""
    wanted = {"automatic_dynamic_shapes": False, "recompile_limit": 1 << 16, "cache_size_limit": 1 << 16}
    config = torch._dynamo.config
    return config.patch({name: value for name, value in wanted.items() if hasattr(config, name)})


def estimate_fake_mode() -> AbstractContextManager[Any]:
    return FakeTensorMode(allow_non_fake_inputs=True)


def differentiate(out: Any) -> None:
    """Run the backward of a step: of the returned scalars, or else of all outputs."""
    outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
    chosen = [x for x in outputs if x.ndim == 0] or outputs
    if chosen:
        torch.autograd.backward(chosen, [torch.empty_like(x) for x in chosen])

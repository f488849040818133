"""The entry point ``torch.compile(model, backend="fusedhead")``: one rewrite, then Inductor.

This file has the parts that a user sees: options, logging, the debug print, strictness, the structured trace, and the
fallback that compiles the original graph after an error.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from fusedhead import compat
from fusedhead.analysis.body import Body
from fusedhead.compat import FakeTensor
from fusedhead.deferred.graph_inputs import any_deferred, expand_inputs
from fusedhead.deferred.graph_outputs import StaleLogits, deferring, on_plain_inputs
from fusedhead.graph.edit import copy_module
from fusedhead.graph.python_dispatch import python_dispatch
from fusedhead.graph.recipes import Wrap, compute_now, unwrapped
from fusedhead.graph.saved_tensor_hooks import unhooked
from fusedhead.inductor.config import Inductor, keyed, overwrites
from fusedhead.kernels.chips import start_checks
from fusedhead.lowering import ranges
from fusedhead.options import Options, split_options
from fusedhead.pipeline import fuse_module
from fusedhead.report import observers as observing
from fusedhead.report.records import symbols
from fusedhead.report.report import PassRecord, Report, pass_table

log = logging.getLogger("fusedhead")


class FusedHeadError(RuntimeError):
    """Raised under ``fusedhead.strict`` for an unfused head or an error inside the pass."""


def graph_text(gm: GraphModule) -> str:
    """The graph's text, for display. A graph that cannot be printed is no error."""
    try:
        return gm.print_readable(print_output=False, include_stride=True, include_device=True)
    except Exception as error:
        return f"(this graph cannot be printed: {type(error).__name__}: {error})"


def run_pass(gm: GraphModule, options: Options, *, texts: bool = True) -> tuple[GraphModule, Report, Wrap]:
    """`fuse_module` with a fallback: if it raises, the original graph is kept.

    ``texts``: whether the report carries the graphs' texts, which take longer to print than the pass takes.
    """
    before = graph_text(gm) if texts else ""
    original = gm.graph
    try:
        if unknown := sorted(set(compat.unknown_modes(gm))):
            raise RuntimeError(f"the graph switches a mode that is not known: {', '.join(unknown)}")
        with unhooked(), python_dispatch(original):
            working, report, wrap = fuse_module(gm, options, show_pass if texts else None)
    except Exception as error:
        if options.strict:
            raise FusedHeadError(f"fusedhead: the pass failed on this graph: {error}") from error
        line = f"{type(error).__name__}: {error}"
        log.warning(
            "fusedhead: the pass could not read this graph and leaves it to Inductor (%s)\n%s",
            line,
            traceback.format_exc(),
        )
        report = Report(graphs=1, before=before, after=before, errors=[line])
        assert gm.graph is original
        return gm, report, unwrapped
    report.before = before
    if not any(head.fused for head in report.heads):
        report.after = before
        return gm, report, unwrapped
    report.after = graph_text(working) if texts else ""
    return working, report, wrap


def show_pass(record: PassRecord, body: Body) -> None:
    """Write the graph after a pass that changed it to the debug log and the structured trace."""
    tracing, debugging = bool(compat.trace_handlers()), log.isEnabledFor(logging.DEBUG)
    if not record.edits or not (tracing or debugging):
        return
    text = graph_text(body.module)
    title = f"{record.name} ({record.edits} edits, {record.milliseconds:.2f} ms)"
    if debugging:
        log.debug("after %s%s:\n%s", title, f" in {body.owner}" if body.owner else "", text)
    if tracing:
        compat.trace_artifact(f"fusedhead_after_{record.name}", lambda: text)


def wants_texts(options: Options) -> bool:
    """Whether the graphs' texts are shown anywhere: debug print, log, trace, or observer."""
    return bool(options.debug or compat.trace_handlers() or observing.readers or log.isEnabledFor(logging.DEBUG))


def publish(report: Report, options: Options) -> None:
    """Publish the report: debug print, log, structured trace."""
    for head in report.heads:
        log.log(logging.WARNING if options.debug and not head.fused else logging.INFO, "%s", head)
    if log.isEnabledFor(logging.DEBUG) and report.heads:
        log.debug("before:\n%s\nafter:\n%s", report.before, report.after)
    if report.heads:
        log.info("%.0f ms in the pass", report.milliseconds)
        compat.trace_artifact("fusedhead_report", lambda: str(report))
        compat.trace_artifact("fusedhead_rewritten_graph", lambda: report.after)
    if options.debug:
        print(report)
        print("\n".join(pass_table(report.passes)))
        if any(head.fused for head in report.heads):
            print(report.after)
    if options.strict:
        unfused = [head for head in report.heads if not head.fused and head.likely]
        if unfused:
            raise FusedHeadError(
                "fusedhead.strict: " + "; ".join(f"the head at {h.where} is not fused: {h.reason}" for h in unfused)
            )


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    ours: Options,
    compiler: Callable[..., Any],
    observe: Callable[[Report], None] = observing.notify,
) -> Callable[..., Any]:
    """Run the pass on one Dynamo graph, publish the report, and compile the result with ``compiler``."""
    if compat.missing:
        return left_to_inductor(ours, lambda: compiler(gm, example_inputs))
    if any_deferred(example_inputs):
        gm, example_inputs, take_deferred = with_sources(gm, example_inputs)
    else:
        cut_out = any(isinstance(value, FakeTensor) for value in example_inputs)
        take_deferred = on_plain_inputs if cut_out and ours.logits == "deferred" else unchanged
    texts = observe is not observing.notify or wants_texts(ours)
    gm, report, wrap = run_pass(gm, ours, texts=texts)
    observe(report)
    publish(report, ours)
    for head in report.heads:
        if head.fused and type(head.vocab_size) is type(head.hidden_size) is int:
            ranges.remember(head.vocab_size, head.hidden_size, head.module or head.where)
    if any(head.fused and head.device == "cuda" for head in report.heads):
        start_checks()
    finish = deferring(ours.budget, overwrites(compiler), ours.min_logits) if ours.logits == "deferred" else compute_now
    try:
        compiled = compiler(gm, example_inputs)
    except Exception as error:
        report.failed(error)
        for head in report.heads:
            log.info("%s", head)
        raise
    compiled = wrap(compiled, finish)
    if any(head.fused for head in report.heads):
        compiled = report.run.counted(compiled, list(symbols(gm.graph).values()))
    return take_deferred(compiled)


def left_to_inductor(ours: Options, compiled: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """Compile the graph without the pass, on a torch that lacks names that the pass needs. Raises under ``strict``."""
    why = compat.unusable()
    if ours.strict:
        raise FusedHeadError(f"fusedhead.strict: {why}")
    return compiled()


def unchanged(compiled: Callable[..., Any]) -> Callable[..., Any]:
    return compiled


def with_sources(
    gm: GraphModule, example_inputs: Sequence[Any]
) -> tuple[GraphModule, Sequence[Any], Callable[..., Any]]:
    """A graph whose inputs are the sources of deferred logits; the given graph if that fails."""
    try:
        working = copy_module(gm)
        with unhooked():
            return working, *expand_inputs(working, example_inputs)
    except StaleLogits:  # a user's error, which eager mode raises too
        raise
    except Exception:
        log.warning("fusedhead: deferred logits enter a graph as a tensor subclass", exc_info=True)
        return gm, example_inputs, unchanged


def compile_with(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    observe: Callable[[Report], None] = observing.notify,
) -> Callable[..., Any]:
    """`compile_graph` with ``mode`` and ``options`` as ``torch.compile`` takes them, which validates them."""
    ours, rest = split_options(options)
    if compat.missing:
        return left_to_inductor(ours, lambda: compat.plain_inductor(gm, example_inputs, mode, rest))
    compiler = Inductor(mode or "default", keyed(rest), None)
    return compile_graph(gm, example_inputs, ours, compiler, observe)


def fusedhead(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """The backend. Takes what ``torch.compile`` passes on: ``mode=`` and ``options=``.

    Raises ValueError for an unknown ``fusedhead.*`` option; an input of the graph never makes it raise, unless
    ``fusedhead.strict`` is set.
    """
    return compile_with(gm, example_inputs, **kwargs)


def reset() -> None:
    """Called by ``torch._dynamo.reset``: forget CUDA graphs, as Inductor's own wrapper does."""
    if not compat.missing:
        compat.InductorWrapper("default", None, None).reset()


fusedhead.reset = reset  # type: ignore[attr-defined]

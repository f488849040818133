"""The result of `fusedhead.estimate` and its text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fusedhead.report.head_record import HeadRecord
from fusedhead.report.rates import Chip
from fusedhead.report.terminal import counted, head_name, size_text


@dataclass(frozen=True)
class HeadEstimate:
    """One head. Bytes are those held for its logits at the peak of a step, beside its operands and their gradients."""

    head: HeadRecord
    bytes_eager: int
    bytes_inductor: int
    bytes_fusedhead: int
    bytes_gradients: int  # of its operands, which exist when the step ends
    flop: int  # of its matrix products under fusedhead
    milliseconds: float | None  # the FLOP at the chip's rate; None where the chip has no rate for the dtype


@dataclass
class StepEstimate:
    """The result of `estimate`: the heads of one step, and the point up to which the program was followed."""

    chip: Chip
    heads: list[HeadEstimate] = field(default_factory=list)
    graphs: int = 0
    stopped: str = ""  # where and why the program was not followed to its end

    def __str__(self) -> str:
        return "\n".join(estimate_table(self))

    def __repr__(self) -> str:
        return f"<fusedhead.StepEstimate: {len(self.heads)} heads on {self.chip.name}>"


def estimate_table(step: StepEstimate) -> Iterator[str]:
    """Lines of 80 columns: one a head, with its place and loss below."""
    graphs = counted(step.graphs, "graph")
    yield f"fusedhead: an estimate for {step.chip.name}: {counted(len(step.heads), 'head')} in {graphs}"
    yield "  MiB held for logits at the peak of a step, beside operands and their gradients"
    if step.heads:
        yield ""
        yield f"  {'head':28} {'eager':>10} {'Inductor':>10} {'fusedhead':>10} {'floor':>12}"
    for one in step.heads:
        head = one.head
        time = "-" if one.milliseconds is None else f"{one.milliseconds:,.2f} ms"
        held = (one.bytes_eager, one.bytes_inductor, one.bytes_fusedhead)
        numbers = " ".join(f"{bytes_ / 2**20:>10,.1f}" for bytes_ in held)
        yield f"  {head_name(head)[-28:]:28} {numbers} {time:>12}"
        sizes = f"N={head.tokens} D={head.hidden_size} V={head.vocab_size} {head.dtype}"
        yield f"    {sizes}: " + (head.computes if head.fused else f"left because {head.reason}")
        yield f"    {head.where}; gradients of its operands take {size_text(one.bytes_gradients)}"
    if not step.heads:
        yield "  no projection with a loss"
    if any(one.milliseconds is not None for one in step.heads):
        yield ""
        yield "  floor: the matrix products alone, which no way to compute a head can avoid, at"
        yield f"  {step.chip.source}"
    if step.stopped:
        yield f"  not followed further: {step.stopped}"

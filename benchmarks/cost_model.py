"""What a head in shards takes with the wire: bytes a token a rank, seconds a step, and efficiency, to 1,024 ranks.

    python -m benchmarks.cost_model [--shapes NxDxV,...] [--chip h200] [--latency US] [--bandwidth GB/s] ...

A step is its products at the chip's rate, or the bytes of its operands and gradients at the memory's where those take
longer, and then its collectives. Nothing of them is taken to be hidden, so this is a bound from above. A collective of
B bytes (of the whole tensor) on w ranks takes

    all_reduce        the less of a ring, 2 (w - 1) l + 2 (w - 1)/w B/b, and a tree, 2 ceil(log2 w) l + 2 B/b
    all_gather        (w - 1) l + (w - 1)/w B/b
    reduce_scatter    likewise

l: the latency of one step, in which a rank sends to another; b: the bytes a second that a rank sends while it receives
as many (NCCL's "bus bandwidth"). Up to ``--node`` ranks the first link counts, beyond it the second. Both numbers are
measured by `benchmarks.parallel`, which writes the model's figure beside each of its own. Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from math import ceil, log2
from typing import NamedTuple

from benchmarks.arrangements import ARRANGEMENTS, MERGES, Arrangement, Collective
from benchmarks.shapes import Case, parse
from fusedhead.report.rates import chip_named

RANKS = tuple(2**k for k in range(11))  # 1 ... 1,024
SHAPES = "8192x8192x128256,16384x4096x256000"


class Link(NamedTuple):
    latency: float  # seconds a step
    bandwidth: float  # bytes a second, each way


class Network(NamedTuple):
    """What the ranks are linked by: inside a node of so many ranks, and between nodes."""

    inside: Link
    between: Link
    node: int

    def link(self, ranks: int) -> Link:
        return self.inside if ranks <= self.node else self.between


# kind: (steps, times that the whole tensor's bytes are sent by a rank), by the number of ranks
Schedule = Callable[[int], tuple[float, float]]
SCHEDULES: dict[str, tuple[Schedule, ...]] = {
    "all_reduce": (
        lambda w: (2 * (w - 1), 2 * (w - 1) / w),  # a ring
        lambda w: (2 * ceil(log2(w)), 2.0),  # a tree, which sends both ways
    ),
    "all_gather": (lambda w: (w - 1, (w - 1) / w),),
    "reduce_scatter": (lambda w: (w - 1, (w - 1) / w),),
}


def sent(collective: Collective, ranks: int) -> float:
    """Bytes that a rank sends, by the schedule that sends the fewest."""
    if ranks == 1:
        return 0.0
    return min(schedule(ranks)[1] for schedule in SCHEDULES[collective.kind]) * collective.nbytes


def seconds(collective: Collective, ranks: int, link: Link) -> float:
    """Time of one collective, by the schedule that takes the least."""
    if ranks == 1:
        return 0.0
    ways = (schedule(ranks) for schedule in SCHEDULES[collective.kind])
    return min(steps * link.latency + times * collective.nbytes / link.bandwidth for steps, times in ways)


def wire(collectives: Iterable[Collective], ranks: int, link: Link) -> float:
    """Seconds of collectives one after the other."""
    return sum(seconds(collective, ranks, link) for collective in collectives)


class Chip(NamedTuple):
    flop: float  # operations a second, of matrix products
    memory: float  # bytes a second


def compute(case: Case, arrangement: Arrangement, ranks: int, chip: Chip) -> float:
    """Seconds of a rank's own work: its products, or h, W and their gradients once through memory."""
    tokens, vocab = (case.tokens, case.vocab / ranks) if arrangement.vocab else (case.tokens / ranks, case.vocab)
    flop = arrangement.products * case.gemm_flop() / ranks
    moved = 2 * (tokens + vocab) * case.hidden * case.torch_dtype.itemsize
    return max(flop / chip.flop, moved / chip.memory)


class Prediction(NamedTuple):
    bytes_a_token: float  # sent by a rank
    compute: float  # seconds
    wire: float  # seconds
    efficiency: float  # of three products of 1/w of the work, against this step

    @property
    def step(self) -> float:
        return self.compute + self.wire


def predict(case: Case, name: str, ranks: int, chip: Chip, network: Network) -> Prediction:
    """One step of a head of ``case``, all of its tokens and classes, on so many ranks."""
    arrangement = ARRANGEMENTS[name]
    collectives = arrangement.collectives(case, ranks)
    products = compute(case, arrangement, ranks, chip)
    least = compute(case, arrangement._replace(products=3), ranks, chip)
    spent = wire(collectives, ranks, network.link(ranks))
    bytes_a_token = sum(sent(collective, ranks) for collective in collectives) / case.tokens
    return Prediction(bytes_a_token, products, spent, least / (products + spent))


def break_even(name: str, over: str, case: Case, ranks: int, network: Network) -> float:
    """Tokens of the group up to which the collectives of ``name`` take no longer than those of ``over``.

    The collectives of one grow with the tokens, those of the other do not; latencies are left out.
    """
    link = network.link(ranks)._replace(latency=0.0)
    one = wire(ARRANGEMENTS[name].collectives(case, ranks), ranks, link) / case.tokens
    return wire(ARRANGEMENTS[over].collectives(case, ranks), ranks, link) / one


HEADINGS = ("ranks", "bytes a token a rank", "compute ms", "wire ms", "step ms", "efficiency")


def table(case: Case, name: str, chip: Chip, network: Network, ranks: Iterable[int] = RANKS) -> str:
    """Markdown: one arrangement at every number of ranks."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for w in ranks:
        each = predict(case, name, w, chip, network)
        products, wire, step = (f"{1e3 * x:.3f}" for x in (each.compute, each.wire, each.step))
        lines.append(f"| {w} | {each.bytes_a_token:,.0f} | {products} | {wire} | {step} | {each.efficiency:.2f} |")
    return "\n".join(lines)


def merges(case: Case, network: Network) -> str:
    """Markdown: microseconds of each merge of the statistics."""
    lines = ["| ranks | " + " | ".join(f"{name}, us" for name in MERGES) + " |", "|---" * (1 + len(MERGES)) + "|"]
    for w in RANKS[1:]:
        each = (wire(merge(case, w), w, network.link(w)) for merge in MERGES.values())
        lines.append(f"| {w} | " + " | ".join(f"{1e6 * spent:,.0f}" for spent in each) + " |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model's arguments. The defaults of the links are a maker's round figures, not measured ones."""
    parser.add_argument("--chip", default="h200", help="of fusedhead.report.rates: the rate of its products")
    parser.add_argument("--tera", type=float, help="TFLOP/s instead of the chip's")
    parser.add_argument("--memory", type=float, default=4.3, help="TB/s of the chip's memory")
    parser.add_argument("--latency", type=float, default=8.0, help="microseconds a step, inside a node")
    parser.add_argument("--bandwidth", type=float, default=300.0, help="GB/s of a rank each way, inside a node")
    parser.add_argument("--between-latency", type=float, default=15.0, help="likewise between nodes")
    parser.add_argument("--between-bandwidth", type=float, default=45.0, help="likewise between nodes")
    parser.add_argument("--node", type=int, default=8, help="ranks of a node")


def given_chip(options: argparse.Namespace, dtype: str = "bfloat16") -> Chip:
    """The chip of the arguments. Raises SystemExit where no rate is known of it."""
    rate = options.tera * 1e12 if options.tera else chip_named(options.chip).flop_per_second.get(dtype)
    if not rate:
        raise SystemExit(f"no rate of {dtype} products is known of the chip {options.chip!r}: give --tera")
    return Chip(rate, options.memory * 1e12)


def given_network(options: argparse.Namespace) -> Network:
    inside = Link(options.latency * 1e-6, options.bandwidth * 1e9)
    return Network(inside, Link(options.between_latency * 1e-6, options.between_bandwidth * 1e9), options.node)


def main(words: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_model", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="NxDxV,... tokens of the group, hidden, classes")
    parser.add_argument("--arrangements", type=lambda s: s.split(";"), default=list(ARRANGEMENTS), help="joined by ;")
    add_arguments(parser)
    options = parser.parse_args(sys.argv[1:] if words is None else words)
    if unknown := [name for name in options.arrangements if name not in ARRANGEMENTS]:
        parser.error(f"no arrangement is called {unknown[0]!r}; there are {'; '.join(ARRANGEMENTS)}")
    network, parts = given_network(options), []
    for case in parse(options.shapes):
        chip = given_chip(options, case.dtype)
        for name in options.arrangements:
            parts += [f"### {case.text}, {name}: {ARRANGEMENTS[name].about}", table(case, name, chip, network)]
        most = break_even("sequence parallel", "fully sharded", case, options.node, network)
        parts.append(merges(case, network))
        parts.append(
            f"On {options.node} ranks the collectives of a sequence-parallel head take no longer than those of a fully "
            f"sharded one up to {most:,.0f} tokens of the group."
        )
    text = "\n\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    main()

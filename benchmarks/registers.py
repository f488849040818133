"""Registers, spills and shared memory of the engine's kernels on each generation of GPUs, found without one.

    TRITON_INTERPRET=0 python -m benchmarks.registers [--cases "mask|cap"] [--chips A100,B200] [--out DIR] [--ptx DIR]
    TRITON_INTERPRET=0 python -m benchmarks.registers --known DIR  # what is on record there is not compiled again

Every kernel that a head of a case launches is compiled by `absent_gpu` with the tile, the constants and the alignments
of that launch. A spill in a kernel that sweeps the logits costs time at once; registers near 255 say that the next
value will spill. Prints a table of cases by kernels and writes it (``H100_triton_3.6.md``) and all numbers with the
version of Triton (``H100_triton_3.6.json``) into --out. A kernel's digest is that of its PTX without line numbers:
equal digests before and after a change mean that it compiles to the same code. ``--ptx`` keeps the PTX itself. ``ir``
is the digest of the first IR that Triton makes of the kernel, of the options and of the assembler's version: with the
same Triton, equal ones mean the same binary, so that ``--known DIR`` takes the numbers of a kernel whose ``ir`` is on
record from there (seconds for minutes), but for ``--again N`` of them, drawn at random.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.absent_gpu import CHIPS, H100, Chip, Compiled, absent_gpu
from benchmarks.machine import versions
from fusedhead.kernels.contract import Head, Needs, RowGrads, RowStats
from fusedhead.kernels.transform.transform import parse
from fusedhead.kernels.triton_engine import engine
from fusedhead.kernels.triton_engine.rows.scale import scale_pair_in_place
from fusedhead.kernels.triton_engine.rows.softmax_statistics import softmax_statistics
from fusedhead.lowering.plan.plan import plan
from fusedhead.lowering.plan.problem import LEAST_MEMORY, Problem
from fusedhead.rules.pointwise_codegen import function_of

CAP = "mul:0.03333333333333333 tanh mul:30.0"
MASK, SET = "dropcol:0", "setcol:0"  # classes at -inf, at another number
aten = torch.ops.aten
GELU, SOFTPLUS, CLAMP = (
    f"fn:{function_of(op, ('z', *bounds), (), 0).text}"
    for op, *bounds in ((aten.gelu.default,), (aten.softplus.default,), (aten.clamp.default, -30.0, 30.0))
)
MIDDLE = (4096, 2048, 128256)  # tokens, hidden, vocabulary; the tile is that of all hidden sizes up to 2048
LLAMA3, GEMMA2, QWEN3 = (8192, 4096, 128256), (8192, 2304, 256000), (8192, 1024, 151936)
NEITHER, OPERANDS, VECTORS = Needs(False, False, False, False), Needs(True, True, False, False), Needs(*4 * (True,))


class Case(NamedTuple):
    """A head, and what is asked of it besides lse and labels."""

    shape: tuple[int, int, int]
    transform: str = ""
    dtype: torch.dtype = torch.bfloat16
    labels: int = 1
    total: bool = False  # label smoothing: the sum over the logits takes part in the loss
    weighted: bool = False  # that sum has weights, one a class
    want: frozenset[str] = frozenset()  # statistics besides
    needs: Needs = OPERANDS
    transposed: bool = False  # w [V, D] lies along the vocabulary
    float8: bool = False  # products of gradients, where the chip has kernels for them


CASES = {
    "plain, D 4096": Case(LLAMA3),
    "plain, D 2304": Case(GEMMA2),
    "plain, D 2048": Case(MIDDLE),
    "plain, D 1024, V 151936": Case(QWEN3),
    "plain, D 768": Case((16384, 768, 50304)),
    "float8, D 2304": Case(GEMMA2, float8=True),
    "float8, D 4096": Case(LLAMA3, float8=True),
    "plain, 64 tokens": Case((64, 4096, 128256)),
    "plain, w along V": Case(MIDDLE, transposed=True),
    "float16": Case(LLAMA3, dtype=torch.float16),
    "float32": Case(MIDDLE, dtype=torch.float32),
    "rows of 123": Case((4096, 123, 50257)),  # strides that TMA does not read
    "bias": Case(MIDDLE, "addcol:0"),
    "bias, trained": Case(MIDDLE, "addcol:0", needs=VECTORS),
    "scale a class": Case(MIDDLE, "mulcol:0"),
    "scale a class, trained": Case(MIDDLE, "mulcol:0", needs=VECTORS),
    "soft cap": Case(MIDDLE, CAP),
    "soft cap, D 2304": Case(GEMMA2, CAP),
    "soft cap, D 768": Case((16384, 768, 50304), CAP),
    "soft cap, float16": Case(MIDDLE, CAP, torch.float16),
    "gelu": Case(MIDDLE, GELU),
    "softplus": Case(MIDDLE, SOFTPLUS),
    "softplus, float32": Case(MIDDLE, SOFTPLUS, torch.float32),
    "clamp": Case(MIDDLE, CLAMP),
    "mask": Case(MIDDLE, MASK),
    "mask, D 4096": Case(LLAMA3, MASK),
    "mask, V 50257": Case((16384, 768, 50257), MASK),
    "mask, float16": Case(MIDDLE, MASK, torch.float16),
    "mask after soft cap": Case(MIDDLE, f"{CAP} {MASK}"),
    "mask before soft cap": Case(MIDDLE, f"{MASK} {CAP}"),
    "set": Case(MIDDLE, SET),
    "set, D 4096": Case(LLAMA3, SET),
    "set after soft cap": Case(MIDDLE, f"{CAP} {SET}"),
    "smoothing": Case(MIDDLE, total=True),
    "smoothing, weights": Case(MIDDLE, total=True, weighted=True),
    "smoothing, mask": Case(MIDDLE, MASK, total=True),
    "entropy": Case(MIDDLE, want=frozenset({"entropy"})),
    "variance": Case(MIDDLE, want=frozenset({"entropy", "variance"})),
    "max, argmax": Case(MIDDLE, "round:bfloat16", want=frozenset({"max", "argmax"})),
    "entropy, soft cap": Case(MIDDLE, CAP, want=frozenset({"entropy"})),
    "4 labels": Case(MIDDLE, labels=4),
    "4 labels, mask": Case(MIDDLE, MASK, labels=4),
    "everything, rows of 123": Case(
        (4096, 123, 50257),
        f"addcol:0 {SOFTPLUS} mulrow:0 {MASK} round:bfloat16",
        labels=4,
        total=True,
        weighted=True,
        want=frozenset({"entropy", "max", "argmax"}),
        needs=VECTORS,
    ),
}
RESULTS = Path(__file__).parent / "results" / "registers"
SWEEPS = ("stream", "stream again", "exp", "exp again", "dlogits")


def launch_all(case: Case) -> None:
    """A training step, one under the least memory, and statistics with a backward pass of their own."""
    (n, d, v), on = case.shape, "meta"
    h = torch.empty(n, d, dtype=case.dtype, device=on)
    w = h.new_empty(d, v).t() if case.transposed else h.new_empty(v, d)
    y = torch.empty(n, case.labels, dtype=torch.int64, device=on)
    row, picked = torch.empty(n, device=on), torch.empty(n, case.labels, device=on)
    u = torch.empty(v if case.weighted else 0, device=on)
    head = Head(h, w, y, torch.empty(1, v, device=on), torch.empty(1, n, device=on), u, parse(case.transform))

    def windows(needs: Needs, **more: Any) -> Any:
        linear = more.pop("linear", True)
        sizes = (n, v, d, case.dtype, "cuda", case.dtype)
        problem = Problem(*sizes, needs, linear, transform=head.transform, labels=case.labels, float8=case.float8)
        return plan(problem, **more).windows

    total = row if case.total else None
    one_sweep = not (case.needs.cols or case.needs.rows)
    for memory in (0, LEAST_MEMORY) if one_sweep and not case.want else ():
        engine.head_loss(head, RowGrads(row, picked, total), case.needs, windows(case.needs, memory=memory))
    want = {"lse", "picked"} | case.want | ({"sum", "spread"} if case.total else set())
    engine.head_stats(head, frozenset(want), windows(NEITHER))
    entropy = row if "entropy" in want else None
    variance = row if "variance" in want else None
    saved = RowStats(row, entropy=entropy, lse_low=row, variance=variance)
    upstream = RowGrads(row, picked, total, entropy, variance=variance)
    engine.head_stats_backward(head, upstream, saved, case.needs, windows(case.needs, linear=False))
    scale_pair_in_place(h, w, row[0], 0.0)
    if case.dtype.itemsize == 2 and not case.transform:  # of a token program's windows
        list(softmax_statistics(h.new_empty((n, v)), (1.0, 0.5)))


def compiled(name: str, chip: Chip = H100, known: Mapping[str, Compiled] | None = None) -> list[Compiled]:
    """All kernels that the case launches. Tiles and alignments decide, so one window says what all of them do."""
    case = CASES[name]
    with absent_gpu(chip, known) as listed:
        launch_all(case)
    return listed


def cases_of(chip: Chip, names: Iterable[str]) -> list[str]:
    """Those that the engine runs on the chip: float8 products need pairs, as `kernels.chips.float8_serves` says."""
    pairs = chip.serves_pairs(torch.device("meta"))
    return [name for name in names if pairs or not CASES[name].float8]


def title(kernel: Compiled) -> str:
    again = " again" if kernel.constants.get("ONLY") else ""
    return kernel.kernel.removesuffix("_kernel") + again


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown: a row a case, a column a sweeping kernel; the others in the last one."""
    lines = ["| case | " + " | ".join(SWEEPS) + " | others, the most |", "|---" * (len(SWEEPS) + 2) + "|"]
    for name, kernels in results.items():
        cells, named = [], [(k["kernel"].replace("_pair", ""), k) for k in kernels]
        for kernel in (*SWEEPS, None):
            chosen = [k for title, k in named if title == kernel or (kernel is None and title not in SWEEPS)]
            most = {key: max((k[key] for k in chosen), default=0) for key in ("registers", "spilled", "shared")}
            spilled = f"**+{most['spilled']}**" if most["spilled"] else "+0"
            cells.append(f"{most['registers']} {spilled}, {most['shared'] / 1024:.0f}" if chosen else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def about(kernel: Compiled) -> dict[str, Any]:
    tile = {name: kernel.constants[name] for name in ("BM", "BN", "BK", "PARTS", "FLATTEN") if name in kernel.constants}
    numbers = {"registers": kernel.registers, "spilled": kernel.spilled, "shared": kernel.shared}
    return {"kernel": title(kernel), **numbers, "tile": tile, "digest": kernel.digest, "ir": kernel.ir}


def on_record(chip: Chip, folder: Path) -> dict[str, Compiled]:
    """The kernels that this version of Triton has compiled for the chip, by the digest of their first IR."""
    file = folder / f"{stem(chip)}.json"
    cases = json.loads(file.read_text())["cases"] if file.exists() else {}
    known = {}
    for of in (of for kernels in cases.values() for of in kernels if "ir" in of):
        name = of["kernel"].removesuffix(" again") + "_kernel"
        taken = (of[key] for key in ("registers", "spilled", "shared", "digest", "ir"))
        known[of["ir"]] = Compiled(name, {}, *taken)
    return known


def measure(
    chip: Chip, names: list[str], jobs: int, ptx: Path | None, known: Mapping[str, Compiled] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """All kernels of these cases as they compile for a chip; their PTX goes into ``ptx``, where that is a folder."""
    results: dict[str, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        several = map if jobs == 1 else pool.map  # a pool starts its processes when it is asked
        listed = several(partial(compiled, chip=chip, known=known), names)
        for name, kernels in zip(names, tqdm(listed, total=len(names), unit="case", desc=chip.name)):
            results[name] = [about(kernel) for kernel in kernels]
            for at, kernel in enumerate(kernels if ptx else ()):
                ptx.mkdir(parents=True, exist_ok=True)  # type: ignore[union-attr]
                (ptx / f"{chip.name}, {name}, {at} {title(kernel)}.ptx").write_text(kernel.ptx)  # type: ignore[operator]
    return results


def stem(chip: Chip) -> str:
    """Of the chip's files."""
    return f"{chip.name.replace(' ', '_')}_triton_{'.'.join(versions()['triton'].split('.')[:2])}"


def record(chip: Chip, results: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Print the table of a chip, and keep it and all numbers in ``folder``."""
    said = versions()
    origin = {"chip": chip._asdict(), "versions": {name: said[name] for name in ("torch", "triton")}}
    lines = [
        f"Compiled for {chip.name} ({chip.architecture}, at most {chip.shared} KiB of shared memory a program) with",
        f"Triton {said['triton']}: registers a thread **+bytes of stack** a thread, KiB of shared memory a program.",
        "`again`: the sweep that redoes marked token blocks. 168 registers and 160 KiB or more: two groups of warps in",
        "turn, a thread of which has 240.",
        "",
        *table(results),
    ]
    print("\n".join(lines))
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(chip)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    rows = ((case, ",\n  ".join(map(json.dumps, kernels))) for case, kernels in results.items())
    cases = ",\n".join(f" {json.dumps(case)}: [\n  {row}\n ]" for case, row in rows)  # a line a kernel
    (folder / f"{name}.json").write_text(f'{{"origin": {json.dumps(origin)}, "cases": {{\n{cases}\n}}}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="a regular expression that their names contain")
    parser.add_argument("--chips", type=lambda text: text.split(","), default=["H100"], help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--known", type=Path, help="a folder; compile only what is not on record there")
    parser.add_argument("--again", type=int, default=0, help="so many of those on record, for each chip")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--ptx", type=Path, help="a folder for every kernel's PTX")
    options = parser.parse_args()
    names = [name for name in CASES if re.search(options.cases, name)]
    for chip in map(CHIPS.__getitem__, options.chips):
        known = on_record(chip, options.known) if options.known else {}
        for ir in random.sample(sorted(known), min(options.again, len(known))):
            del known[ir]
        record(chip, measure(chip, cases_of(chip, names), options.jobs, options.ptx, known), options.out)


if __name__ == "__main__":
    main()

"""Float8 gradients beside exact ones, by the CUDA engine alone: errors, times, bytes and each kernel's share.

    python -m benchmarks.gpu_float8 [--shapes 8192x4096x128256,...] [--data trained,random] [--seconds 80] [--out FILE]

Errors are relative to float64, for dH, dW, the rows of dW whose class is no label (``rare``) and the median of these
rows with its angle; the lse is compared with that of exact products. Times are medians of
``triton.testing.do_bench`` over rounds that visit every step in turn, and of short steps those of a device that the
host is ahead of (`measure.device_ms`). MiB is the peak of a step above what was there, less dH and dW. Float8 is
allowed at every hidden size here, where a plan would refuse it as too slow.

``--kernels NAME,...``: packages that each hold a ``kernels`` folder, fusedhead's by default. Another version's kernels,
copied under another name, are measured beside these in the same process. One that fails, or errs twice as much as
eager code, is named and measured no more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks import data, machine, measure, shapes
from benchmarks.errors import relative, truth_of
from benchmarks.gpu_heads import BF16, OPERANDS
from benchmarks.shapes import Case
from benchmarks.tasks import TASKS
from fusedhead.kernels.contract import Head, HeadGrads, RowGrads, RowStats, Windows
from fusedhead.kernels.transform.transform import Transform
from fusedhead.lowering.plan import float8
from fusedhead.lowering.plan.plan import plan
from fusedhead.lowering.plan.problem import Problem

SHAPES = "16384x768x50304,8192x4096x128256,8192x1024x151936,8192x2304x256000,4096x8192x128256"
Results = tuple[RowStats, HeadGrads]
Step = Callable[[], Results]
ROUNDS, KERNELS, RARE = 3, 16, 4096  # rounds; kernels listed, rows of dW whose errors are looked at one by one
SECTION = 8.0  # seconds that must be left to begin a shape


@contextmanager
def any_hidden_size() -> Iterator[None]:
    """Inside, plans take float8 at every hidden size that its kernels take."""
    before = float8.EXACT
    float8.EXACT = tuple(rule for rule in before if "hidden size is below" not in rule[0])
    try:
        yield
    finally:
        float8.EXACT = before


class Kernels:
    """One package of kernels: its single passes, which take its own types."""

    def __init__(self, package: str) -> None:
        def module(name: str) -> Any:
            return import_module(f"{package}.kernels.{name}")

        self.contract, self.transform = module("contract"), module("transform.transform").Transform()
        self.engine, self.pass8 = module("triton_engine.engine"), module("triton_engine.float8.single_pass")
        for name in ("pairs", "float8", "triton"):  # what is measured is not tried beforehand
            module("self_check").decide(name, torch.device("cuda", torch.cuda.current_device()), True)

    def step(self, head: Head, c: RowGrads, windows: Windows) -> Step:
        own = self.contract.Head(*head[:-1], self.transform)
        coefficients, cut = self.contract.RowGrads(*c), self.contract.Windows(*windows)
        if windows.tail_rows:
            return lambda: self.pass8.one_float8_pass(own, coefficients, cut)
        return lambda: self.engine.head_loss(own, coefficients, self.contract.Needs(*OPERANDS), cut)


def batch_of(case: Case, kind: str) -> data.Batch:
    return data.ALL_SETS[kind](case, torch.device("cuda"))


def made(batch: data.Batch) -> tuple[Head, RowGrads]:
    """The head of a data set, and the coefficients of a mean cross-entropy over the tokens that have a label."""
    keep, nothing = batch.y >= 0, torch.empty(0, device=batch.y.device)
    c = keep.float() / keep.sum()
    label = torch.where(keep, batch.y, 0)[:, None].contiguous()
    head = Head(batch.h, batch.w, label, nothing.view(0, 1), nothing.view(0, 1), nothing, Transform())
    return head, RowGrads(c, -c[:, None].contiguous())


def windows_of(case: Case, gradients: str) -> Windows:
    sizes = case.tokens, case.vocab, case.hidden
    with any_hidden_size():
        planned = plan(Problem(*sizes, BF16, "cuda", BF16, float8=gradients == "float8"))
    assert (planned.algorithm == "float8") == (gradients == "float8"), planned
    return planned.windows


def eager(head: Head, c: RowGrads) -> tuple[Tensor, Tensor]:
    """dh and dw as eager code computes them, from bfloat16 logits."""
    assert c.lse is not None
    assert c.picked is not None
    p = (head.h @ head.w.t()).float().softmax(1)
    dz = p.mul_(c.lse[:, None]).scatter_add_(1, head.y, c.picked).to(head.h.dtype)
    return dz @ head.w, dz.t() @ head.h


def compared(case: Case, kind: str, packages: dict[str, Kernels], dropped: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Errors of eager code, exact products and each package's float8 ones. Packages that fail move to ``dropped``."""
    batch = batch_of(case, kind)
    true = truth_of(TASKS["train"], batch)
    head, c = made(batch)
    rare = torch.bincount(head.y[:, 0], minlength=case.vocab) == 0
    some = rare.nonzero()[:RARE, 0]

    def of(dh: Tensor | None, dw: Tensor | None) -> dict[str, Any]:
        assert dh is not None
        assert dw is not None
        each, want = dw[some].double(), true.dw[some].double()
        return {
            "dh": relative(dh, true.dh),
            "dw": relative(dw, true.dw),
            "rare": relative(dw[rare], true.dw[rare]),
            "median row": float(((each - want).norm(dim=1) / want.norm(dim=1)).median()),
            "median angle": float(cosine_similarity(each, want).clamp(-1, 1).acos().median()),
        }

    found = {"eager": of(*eager(head, c))}
    exact, grads = packages["fusedhead"].step(head, c, windows_of(case, "exact"))()
    found["exact"] = of(grads.h, grads.w)
    for name, kernels in list(packages.items()):
        step = kernels.step(head, c, windows_of(case, "float8"))
        try:
            (stats, grads), again = step(), step()[1]
        except Exception as error:
            dropped[name] = f"{case.text}: {type(error).__name__}: {error}"[:300]
        else:
            apart = float((stats.lse - exact.lse).abs().max())
            same = all(torch.equal(a, b) for a, b in zip(grads[:2], again[:2]))  # type: ignore[arg-type]
            found[name] = of(grads.h, grads.w) | {"lse apart": apart, "same twice": same}
            if not all(found[name][what] < 2 * found["eager"][what] for what in ("dh", "dw")):
                dropped[name] = f"{case.text}, {kind} data: errs twice as much as eager code"
        if name in dropped and name != "fusedhead":
            del packages[name]
    return found


def shares(step: Step, repeat: int = 3) -> dict[str, Any]:
    """Milliseconds of a step's kernels: their sum, and those that take the most, by name and number of launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(repeat):
            step()
        torch.cuda.synchronize()
    rows = [(e.key[:60], e.device_time_total / 1e3 / repeat, e.count / repeat) for e in trace.key_averages()]
    return {"sum": sum(row[1] for row in rows), "kernels": sorted(rows, key=lambda row: -row[1])[:KERNELS]}


def held(step: Step) -> float:
    """MiB at the peak of a step, less its dh and dw."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = step()[1]
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - grads.h.nbytes - grads.w.nbytes) / 2**20  # type: ignore[union-attr]


def times(case: Case, kind: str, packages: dict[str, Kernels]) -> dict[str, dict[str, Any]]:
    from triton.testing import do_bench

    head, c = made(batch_of(case, kind))
    exact, planned = (windows_of(case, gradients) for gradients in ("exact", "float8"))
    ways = {"": planned}
    whole = -(-case.tokens // 128) * 128
    if case.hidden < float8.LEAST_HIDDEN and planned.tokens < whole:
        ways[", dw in one window"] = planned._replace(tokens=whole)
    steps = {"exact": (exact, packages["fusedhead"].step(head, c, exact))}
    for way, cut in ways.items():
        steps |= {f"{name}{way}": (cut, kernels.step(head, c, cut)) for name, kernels in packages.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, (cut, step) in steps.items():
        step()
        found[name] = {"windows": [cut.tokens, cut.tail_rows], "MiB": held(step), "all ms": []}
    for _ in range(ROUNDS):
        for name, (_, step) in steps.items():
            found[name]["all ms"].append(float(do_bench(step, warmup=15, rep=60, return_mode="median")))
    for name, (_, step) in steps.items():
        row = found[name]
        row["ms"] = sorted(row["all ms"])[ROUNDS // 2]
        row["device ms"] = measure.device_ms(step, torch.device("cuda"), row["ms"])  # type: ignore[arg-type]
        row |= shares(step)
    return found


def table(result: dict[str, Any]) -> list[str]:
    lines = ["step: ms (over exact) [device ms (over exact)] {sum of its kernels} MiB, tokens of dw's and dh's windows"]
    for key, rows in result["times"].items():
        for name, row in rows.items():
            exact, device = rows["exact"], row["device ms"]
            ahead = f" [{device:.2f} ({device / exact['device ms']:.3f})]" if device and exact["device ms"] else ""
            text = f"{row['ms']:.2f} ({row['ms'] / exact['ms']:.3f}){ahead} {{{row['sum']:.2f}}} {row['MiB']:.0f}"
            lines.append(f"{key}: {name}: {text} {row['windows']}")
    lines.append("errors over exact's (over eager's); a median rare row, its angle (eager's row); the lse from exact's")
    for key, found in result["errors"].items():
        exact, plain = found["exact"], found["eager"]
        lines.append(f"{key}: exact dh {exact['dh']:.2e} dw {exact['dw']:.2e}")
        for name, row in found.items():
            if name not in ("exact", "eager"):
                whats = ("dh", "dw", "rare")
                over = [f"{what} {row[what] / exact[what]:.2f} ({row[what] / plain[what]:.2f})" for what in whats]
                one = f"row {row['median row']:.1e} {row['median angle']:.1e} ({plain['median row']:.1e})"
                same = "" if row["same twice"] else ", differs from run to run"
                lines.append(f"   {name}: {' '.join(over)} {one} lse {row['lse apart']:.1e}{same}")
    return lines + [f"{name} left out: {why}" for name, why in result["left out"].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--data", type=lambda text: text.split(","), default=list(data.SETS), help="timed: the first")
    parser.add_argument("--kernels", type=lambda text: text.split(","), default=["fusedhead"])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing that may take longer")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--once", action="store_true", help="only run every step once: its kernels are compiled")
    parser.add_argument("--out", type=Path, default=Path("float8.json"))
    given = parser.parse_args()
    began, packages = time.monotonic(), {name: Kernels(name) for name in given.kernels}
    dropped: dict[str, str] = {}
    result: dict[str, Any] = {"origin": machine.origin(torch.device("cuda"), "benchmarks.gpu_float8")}
    result |= {"times": {}, "errors": {}, "left out": dropped}
    cases = shapes.parse(given.shapes)
    for kind in given.data[:1] if given.once else given.data:
        for case in cases:
            if time.monotonic() - began > given.seconds - SECTION:
                dropped.setdefault(f"{case.text} {kind}", "no time left")
                continue
            if given.once:
                for name in packages:
                    for gradients in ("exact", "float8") if name == "fusedhead" else ("float8",):
                        packages[name].step(*made(batch_of(case, kind)), windows_of(case, gradients))()
                continue
            result["errors"][f"{case.text} {kind}"] = compared(case, kind, packages, dropped)
            if kind == given.data[0] and not given.no_times:
                result["times"][case.text] = times(case, kind, packages)
            given.out.write_text(json.dumps(result, indent=1))
            torch.cuda.empty_cache()
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()

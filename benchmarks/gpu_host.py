"""What does a head cost the host? Time to enqueue a step, beside the time the device takes for it.

    python benchmarks/gpu_host.py [--shapes 2048x4096x32000,...] [--items] [--profile N] [--not-recorded]

Few tokens are bound by whichever of the two is longer. Per shape and step: the median time until the call returns
(no synchronisation inside), the median time until the device is done with that one call, and the time of a call in
a row of calls. Steps are the engine's functions by themselves and the programs of `benchmarks.tasks` compiled with
Inductor and with fusedhead. ``--items`` takes the training step apart: its forward alone, the op that the forward
calls, the engine without its launches and products (Python and allocations). ``--profile`` adds where the host's time
goes, the N functions with the largest own time. ``--not-recorded`` leaves launches to Triton's launcher, to measure
what `launch.launcher` saves.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import data, shapes, tasks
from benchmarks.contenders import STRICT, compiled
from benchmarks.gpu_heads import OPERANDS, make_grads, make_head
from benchmarks.gpu_heads import Case as HeadCase
from fusedhead.kernels.contract import Needs, Windows
from fusedhead.kernels.triton_engine import engine, single_pass, weight_gradient
from fusedhead.kernels.triton_engine.launch import launch
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.lowering.plan.plan import plan
from fusedhead.lowering.plan.problem import Problem

Step = Callable[[], object]
EACH = 100
SHAPES = "2048x4096x32000,512x4096x128256"
FROZEN = Needs(True, False, False, False)


def median(samples: list[float]) -> float:
    return sorted(samples)[len(samples) // 2] * 1e6


def times(step: Step, repeat: int = 20) -> tuple[float, float, float]:
    """Microseconds: until the call returns, until the device is done, and of one call of a row of them."""
    for _ in range(3):
        step()
    returned, done = [], []
    for _ in range(repeat):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        returned.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        done.append(time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeat):
        step()
    end.record()
    end.synchronize()
    return median(returned), median(done), start.elapsed_time(end) / repeat * 1e3


def engine_steps(case: shapes.Case) -> dict[str, Step]:
    """The engine's three functions in the windows that the planner picks."""
    n, d, v, dtype = case.tokens, case.hidden, case.vocab, case.torch_dtype
    made = HeadCase(n, d, v, dtype)
    head = make_head(made, "cuda")
    g = make_grads(made, head)._replace(square=None)
    want = frozenset({"lse", "picked"})

    def windows(**options: object) -> Windows:
        return plan(Problem(n, v, d, dtype, "cuda", dtype, **options)).windows  # type: ignore[arg-type]

    stats = engine.head_stats(head, want, windows())
    return {
        "engine forward": partial(engine.head_stats, head, want, windows()),
        "engine loss": partial(engine.head_loss, head, g, OPERANDS, windows()),
        "engine frozen": partial(engine.head_loss, head, g, FROZEN, windows(needs=FROZEN)),
        "engine recompute": partial(engine.head_stats_backward, head, g, stats, OPERANDS, windows(linear=False)),
    }


def program_steps(case: shapes.Case, names: list[str]) -> dict[str, Step]:
    """The benchmark's tasks through compiled functions, and their bare products."""
    batch = data.trained(case, torch.device("cuda"))
    steps: dict[str, Step] = {}
    for task in (tasks.TASKS[name] for name in names):
        steps[f"{task.name}: bare products"] = tasks.floor_step(task, batch)
        for backend, options in (("inductor", None), ("fusedhead", STRICT)):
            program = compiled(backend, options)(task)
            steps[f"{task.name}: {backend}"] = tasks.step_of(task, program, batch)
            steps[f"{task.name}: {backend}"]()
    return steps


def items(case: shapes.Case) -> dict[str, Step]:
    """Parts of a training step with fusedhead, each by itself."""
    n, d, v, dtype = case.tokens, case.hidden, case.vocab, case.torch_dtype
    task, batch = tasks.TASKS["train"], data.trained(case, torch.device("cuda"))
    h, w = (x.detach().requires_grad_() for x in (batch.h, batch.w))
    parts: dict[str, Step] = {}
    for backend, options in (("inductor", None), ("fusedhead", STRICT)):
        program = compiled(backend, options)(task)
        program(h, w, batch.y)
        parts[f"{backend}: forward of a training step"] = partial(program, h, w, batch.y)
    made = HeadCase(n, d, v, dtype)
    head = make_head(made, "cuda")
    g = make_grads(made, head)._replace(square=None)
    absent = head.h.new_empty(0, dtype=torch.float32)
    c = [absent if x is None else x for x in (g.lse, g.picked, g.sum, g.square)]
    op = torch.ops.fusedhead.head_loss.default
    parts["the op"] = partial(op, *head[:6], *c, "", "lse,picked", 0, *OPERANDS)
    parts["the engine"] = loss = engine_steps(case)["engine loss"]

    def without_launches() -> None:
        with (
            patch.object(Launch, "run", lambda self, **given: None),
            patch.object(single_pass, "gemm", lambda *given, **options: None),
            patch.object(weight_gradient, "gemm", lambda *given, **options: None),
        ):
            for _ in range(EACH):
                loss()

    parts[f"the engine without launches and products, {EACH} times"] = without_launches
    return parts


def profiled(step: Step, lines: int, calls: int = 30) -> str:
    """The functions with the largest own time over some calls of the step."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(calls):
        step()
    profile.disable()
    torch.cuda.synchronize()
    out = io.StringIO()
    pstats.Stats(profile, stream=out).sort_stats("tottime").print_stats(lines)
    return "\n".join(line for line in out.getvalue().splitlines() if line.strip())


def primitives() -> dict[str, Step]:
    """What single calls into torch and CUDA cost on this host."""
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="cuda")
    device = torch.device("cuda", 0)

    def on_device() -> None:
        with torch.cuda.device(device):
            pass

    def addmm() -> None:
        torch.addmm(x, x, x, beta=0.0, out=x)

    return {
        "new_empty": lambda: x.new_empty(64),
        "slice": lambda: x[:32],
        "data_ptr": x.data_ptr,
        "with torch.cuda.device": on_device,
        "current_device": torch.cuda.current_device,
        "add_ (a launch)": lambda: x.add_(1),
        "addmm(out=)": addmm,
        "is_current_stream_capturing": torch.cuda.is_current_stream_capturing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="NxDxV[:dtype], comma-separated")
    parser.add_argument("--tasks", default="forward,train,frozen", help="comma-separated")
    parser.add_argument("--profile", type=int, default=0, help="functions to list a profile")
    parser.add_argument("--items", action="store_true", help="the training step taken apart")
    parser.add_argument("--not-recorded", action="store_true", help="launch through Triton's launcher, as it is")
    options = parser.parse_args()
    if options.not_recorded:
        patch.object(launch, "recorded", return_value=None).start()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print("microseconds: call returns / device done / a call in a row of calls")
    for name, step in primitives().items():
        print(f"  {name}: " + " / ".join(f"{us:.1f}" for us in times(step, 200)), flush=True)
    for case in shapes.parse(options.shapes):
        print(case.text)
        steps = engine_steps(case) | program_steps(case, options.tasks.split(","))
        steps |= items(case) if options.items else {}
        for name, step in steps.items():
            print(f"  {name}: " + " / ".join(f"{us:.0f}" for us in times(step)), flush=True)
        if options.profile:
            for name, step in steps.items():
                if name.endswith((": fusedhead", "loss")):
                    print(f"  {name}\n{profiled(step, options.profile)}", flush=True)


if __name__ == "__main__":
    main()

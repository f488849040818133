"""The host's share of a head's step without a GPU: the Triton engine runs, and what it launches does nothing.

    python benchmarks/host_share.py [--profile N]

Triton's launcher over a driver that does nothing, on tiny tensors on the CPU: what is left is the Python of the engine,
of the op around it and of the compiled step, with its allocations and two or three tiny products. Prints for each part
the least time of many calls in microseconds, and the Python and C functions that one call enters (`sys.setprofile`),
which no load on the machine changes. `gpu_host.py` measures the same parts on a GPU. Needs Triton.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import pstats
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import tasks
from benchmarks.contenders import STRICT, compiled
from benchmarks.data import Batch
from fusedhead.kernels.contract import Head, Needs, RowGrads, Windows
from fusedhead.kernels.transform.transform import parse
from fusedhead.kernels.triton_engine import engine
from fusedhead.lowering import engines, ops

Step = Callable[[], object]
N, D, V = 64, 16, 64
DTYPE = torch.float32  # of which the CPU has the products that the engine takes on a GPU


class Launcher:
    """As Triton's: a Python object over a C function, which takes any arguments."""

    launch = staticmethod(itertools.chain)

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *more: Any) -> None:
        self.launch(x, y, z, stream, function, *more)


class Compiled:
    run, function, packed_metadata = Launcher(), 7, (8, 1, 0)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args, stream: self.run(*grid, stream, 7, (8, 1, 0), None, None, None, *args)


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Inside, heads on the CPU are the Triton engine's, and what it launches does nothing."""
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=abs)
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (JITFunction, "run", lambda self, *args, **options: Compiled()),
            (driver, "_active", active),
            (engines.TritonWindows, "supports", lambda self, dtype, device_type: True),
            (ops, "head_of", lambda given, text: Head(*given, parse(text))),  # labels on a CPU are read
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield


def least(step: Step, repeat: int = 3000) -> float:
    """Microseconds of the fastest call."""
    clock, found = time.perf_counter_ns, []
    for _ in range(repeat):
        begin = clock()
        step()
        found.append(clock() - begin)
    return min(found) / 1e3


def entered(step: Step) -> tuple[int, int]:
    """The Python and the C functions that a call enters, in this thread."""
    count: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, arg: count.update((event,)))
    try:
        step()
    finally:
        sys.setprofile(None)
    return count["call"], count["c_call"] - 1  # the last one ends the count


def ops_of_a_step() -> dict[str, Step]:
    """The calls of ops that Inductor's code has, and the engine's below them."""
    h, w = torch.zeros(N, D, dtype=DTYPE), torch.zeros(V, D, dtype=DTYPE)
    y, none = torch.zeros(N, 1, dtype=torch.int64), torch.empty(0)
    head, stats = Head(h, w, y, none, none, none, parse("")), "lse,picked,lse_low"
    c = RowGrads(torch.ones(N), torch.ones(N, 1))
    needs, windows = Needs(True, True, False, False), Windows(N, V, DTYPE)
    called = torch.ops.fusedhead
    loss = (*head[:6], c.lse, c.picked, none, none, "", stats, 0, *needs)
    return {
        "engine loss": partial(engine.head_loss, head, c, needs, windows),
        "engine statistics": partial(engine.head_stats, head, frozenset({"lse", "picked"}), windows),
        "the op": partial(called.head_loss_traced.default, *loss),
        "the op of statistics": partial(called.head_stats_traced.default, *head[:6], "", stats, 0),
    }


def parts() -> dict[str, Step]:
    found = ops_of_a_step()
    h, w = torch.zeros(N, D, dtype=DTYPE), torch.zeros(V, D, dtype=DTYPE)
    y = torch.zeros(N, 1, dtype=torch.int64)
    batch = Batch(h, w, y[:, 0], torch.ones(()))
    for backend, options in (("inductor", None), ("fusedhead", STRICT)):
        for task in (tasks.TASKS[name] for name in ("forward", "train")):
            found[f"{task.name}: {backend}"] = tasks.step_of(task, compiled(backend, options)(task), batch)
    held = h.detach().requires_grad_(), w.detach().requires_grad_()
    for backend, options in (("inductor", None), ("fusedhead", STRICT)):
        program = compiled(backend, options)(tasks.TASKS["train"])
        found[f"forward of a training step: {backend}"] = partial(program, *held, y[:, 0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=int, default=0, help="functions of the training step to list by own time")
    parser.add_argument("--repeat", type=int, default=3000)
    options = parser.parse_args()
    print("torch", torch.__version__, "microseconds, Python functions, C functions")
    with launching_nothing():
        for name, step in parts().items():
            for _ in range(5):
                step()
            python, c = entered(step)
            print(f"  {name}: {least(step, options.repeat):.1f}, {python}, {c}", flush=True)
            if options.profile and name in ("train: fusedhead", "engine loss", "the op"):
                profile = cProfile.Profile()
                profile.runcall(lambda: [step() for _ in range(200)])  # noqa: B023
                pstats.Stats(profile).sort_stats("tottime").print_stats(options.profile)


if __name__ == "__main__":
    main()

"""Time and memory of a step: medians over interleaved rounds, and the peak of one step above what was there.

Contenders take turns in every round, so a clock that drifts drifts for all of them, and in another order each round: a
turn runs up to 3 % faster behind a short or memory-bound one, which leaves the chip cooler. A turn is one untimed step,
which brings the allocator and the caches to this contender's state, and then a few timed ones behind it without a
pause, so that launch latency hides where it hides in training.
"""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Step = Callable[[], Sequence[Tensor]]
TURN_SECONDS = 0.03  # timed part of a turn, when one step is shorter
FEWEST_ROUNDS = 3
LONG_MS = 8.0  # of a step, from where on no host is slower than the device
LAYERS, SIDE, AHEAD = 32, 8192, 8  # products of this side before a step, about 50 ms, and steps enqueued meanwhile


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Drop what died and give cached memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def settle(device: torch.device, dtype: torch.dtype) -> None:
    """Make the libraries allocate their workspaces, in forward's and autograd's threads, before measuring."""
    h = torch.randn(256, 64, device=device, dtype=dtype, requires_grad=True)
    w = torch.randn(256, 64, device=device, dtype=dtype, requires_grad=True)
    torch.autograd.grad((h @ w.t()).float().logsumexp(-1).sum(), (h, w))
    wait(device)


def turn(step: Step, device: torch.device, repeat: int) -> float:
    """Seconds a step: one untimed step, then ``repeat`` timed ones, by device events or the wall clock."""
    step()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeat
    begin = time.perf_counter()
    for _ in range(repeat):
        step()
    return (time.perf_counter() - begin) / repeat


def device_ms(step: Step, device: torch.device, ms: float) -> float | None:
    """Milliseconds of the device for a step that was enqueued ahead: behind products as in a model's layers, which
    keep the device as warm as it is there (a pause would let its clock rise), while the host enqueues some steps. None
    on the CPU, and for steps so long that the host is ahead anyway."""
    if device.type != "cuda" or ms > LONG_MS:
        return None
    a, b, c = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(3))
    times = []
    for _ in range(FEWEST_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(LAYERS):
            torch.mm(a, b, out=c)
        start.record()
        for _ in range(AHEAD):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / AHEAD)
    return statistics.median(times)


def interleaved(
    steps: dict[str, Step],
    device: torch.device,
    rounds: int,
    seconds: float,
    deadline: float = float("inf"),
    seen: Callable[[str], None] = lambda name: None,
    agree: Callable[[float], float] = float,
) -> dict[str, list[float]]:
    """Seconds a step of every contender, one number a round.

    ``rounds`` at most for each; fewer (but FEWEST_ROUNDS) where they would take longer than ``seconds``. The first
    round, which finds out how long a step takes, is in the order given, each other one in an order of its own.
    Stops early at ``deadline`` (`time.monotonic`). ``seen`` is told each name before its turn. A contender
    that fails in a turn keeps the numbers it has. Where several processes measure steps that wait for each other,
    ``agree`` makes of a number of each the greatest of all: times are those of the slowest, and all do the same.
    """
    repeat: dict[str, int] = {}  # timed steps a turn
    allowed: dict[str, int] = {}  # rounds
    times: dict[str, list[float]] = {name: [] for name in steps}
    crowded = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory // 2

    shuffle = random.Random(0).shuffle
    order = list(steps.items())
    for number in range(rounds):
        if number:
            shuffle(order)
        for name, step in order:
            if number and number >= allowed[name]:
                continue
            if deadline < float("inf") and agree(time.monotonic() - deadline) > 0 and times[name]:
                continue
            seen(name)
            if crowded and torch.cuda.memory_reserved(device) > crowded:
                torch.cuda.empty_cache()
            try:
                if not number:
                    once = max(agree(turn(step, device, 1)), 1e-6)
                    repeat[name] = max(1, min(50, round(TURN_SECONDS / once)))
                    fit = int(seconds / (once * (repeat[name] + 1)))
                    allowed[name] = max(FEWEST_ROUNDS, min(rounds, fit))
                times[name].append(agree(turn(step, device, repeat[name])))
            except RuntimeError:  # out of memory beside the others' leftovers
                allowed[name] = 0
                release(device)
    return times


def median_ms(times: list[float]) -> float | None:
    return statistics.median(times) * 1e3 if times else None


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float | None:
    """The median over the rounds of a time and another's in the same round: what a machine's other work changes in
    both is no part of it."""
    return statistics.median(a / b for a, b in zip(times, others)) if times and others else None


def cpu_allocations(run: Callable[[], Result]) -> tuple[Result, list[int]]:
    """What ``run`` returns, and the bytes of every allocation (and, negative, release) by torch's CPU allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        result = run()
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_of(allocated: Sequence[int]) -> int:
    """Bytes live at the peak, above what was there before."""
    return max(itertools.accumulate(allocated, initial=0))


def extra_bytes(step: Step, device: torch.device, resident: int | None = None) -> int:
    """Peak bytes of one step above what was there, less the bytes of what it returns.

    On CUDA: the allocator's own peak, above ``resident`` (bytes allocated before the contender was first
    called, so that what it keeps between steps counts). On the CPU: `cpu_allocations`, summed in order; a
    library's private scratch does not show there.
    """
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device) if resident is None else resident
        torch.cuda.reset_peak_memory_stats(device)
        results = step()
        wait(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        results, allocated = cpu_allocations(step)
        peak = peak_of(allocated)
    return peak - sum(t.numel() * t.element_size() for t in results)


def resident_bytes(device: torch.device) -> int:
    """Bytes allocated now (0 on the CPU, where only changes are traced)."""
    if device.type != "cuda":
        return 0
    wait(device)
    return torch.cuda.memory_allocated(device)


def put_times(row: Any, seconds: list[float]) -> None:
    """Put a contender's times of a step into its row: median, rounds, the fastest, and the spread over the median."""
    row.ms, row.rounds = median_ms(seconds), len(seconds)
    if row.ms:
        row.best_ms = min(seconds) * 1e3
        row.spread = (max(seconds) - min(seconds)) * 1e3 / row.ms

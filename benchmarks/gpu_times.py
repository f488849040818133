"""How far is the CUDA engine from the bare GEMMs on this GPU?

    python benchmarks/gpu_times.py                  bfloat16 heads beside bare GEMMs
    python benchmarks/gpu_times.py --variants       transforms, more statistics, other dtypes

Times are medians of ``triton.testing.do_bench``, over rounds that visit every step in turn so that all see the same
clocks. The floor of a training step is its three bare GEMMs; MiB are the peak above what was allocated before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from gpu_heads import BF16, F16, F32, OPERANDS, SOFTCAP, Case, make_grads, make_head

from fusedhead.kernels.contract import STATS, Head, Needs, RowGrads, RowStats, Windows
from fusedhead.kernels.triton_engine import engine

SHAPES = (
    ("llama3-8b", 8192, 4096, 128256),
    ("gemma2-2b", 8192, 2304, 256000),
    ("qwen3-0.6b", 8192, 1024, 151936),
    ("gpt2", 16384, 768, 50304),
    ("llama2, few tokens", 2048, 4096, 32000),
    ("llama3, fewer", 512, 4096, 128256),
)


def extra_memory(step: Callable[[], object]) -> float:
    """MiB at the peak of a step above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def medians(steps: dict[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """Milliseconds of each step: the median over rounds that visit all steps in turn, so that all share clocks."""
    from triton.testing import do_bench

    by_step: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            by_step[name].append(float(do_bench(step, warmup=20, rep=60, return_mode="median")))
    return {name: sorted(times)[len(times) // 2] for name, times in by_step.items()}


def time_shape(name: str, n: int, d: int, v: int, windows: tuple[int, ...]) -> None:
    c = Case(n, d, v, BF16)
    head = make_head(c, "cuda")
    g = make_grads(c, head)._replace(square=None)
    h, w, want, whole = head.h, head.w, frozenset({"lse", "picked"}), Windows(n, v, BF16)
    held = min(n, 8192)  # tokens of one bare GEMM
    x, z = h[:held], torch.empty(held, v, dtype=BF16, device="cuda")
    stats = engine.head_stats(head, want, whole)
    frozen = Needs(True, False, False, False)

    def loss(m: int, needs: Needs) -> RowStats:
        return engine.head_loss(head, g, needs, Windows(m, v, BF16))[0]

    def recompute(vocab: int) -> object:
        return engine.head_stats_backward(head, g, stats, OPERANDS, Windows(n, vocab, F32))

    steps: dict[str, Callable[[], object]] = {
        "h wT": lambda: torch.mm(x, w.t(), out=z),
        "forward": lambda: engine.head_stats(head, want, whole),
        "z w": lambda: torch.mm(z, w),
        "zT h": lambda: torch.mm(z.t(), x),
    }
    windows = tuple(m for m in windows if m <= max(n, min(windows)))
    for m in windows:
        steps |= {f"loss {m}": partial(loss, m, OPERANDS), f"frozen {m}": partial(loss, m, frozen)}
    steps |= {f"recompute {vocab}": partial(recompute, vocab) for vocab in (8192, 32768)}
    t = medians(steps)
    first, dh, dw = (n / held * t[name] for name in ("h wT", "z w", "zT h"))
    floor = first + dh + dw
    print(f"{name} ({n}, {d}, {v}): GEMMs {first:.2f} + {dh:.2f} + {dw:.2f} = {floor:.2f} ms")
    mib = extra_memory(steps["forward"])
    print(f"  forward {t['forward']:.2f} ms = {first / t['forward']:.3f} of the bare GEMM, {mib:.1f} MiB")
    for m in windows:
        a, b, mib = t[f"loss {m}"], t[f"frozen {m}"], extra_memory(steps[f"loss {m}"])
        print(
            f"  loss, tokens {m}: {a:.2f} ms = {floor / a:.3f} of three GEMMs, {mib:.0f} MiB;"
            f" frozen w {b:.2f} ms = {(first + dh) / b:.3f} of two"
        )
    for vocab in (8192, 32768):
        a, mib = t[f"recompute {vocab}"] + t["forward"], extra_memory(steps[f"recompute {vocab}"])
        print(f"  recompute, vocab {vocab}: {a:.2f} ms = {(floor + first) / a:.3f} of four GEMMs, {mib:.0f} MiB")


def time_variants() -> None:
    """What transforms, more statistics and float32 cost beside the plain case."""
    everything = frozenset(STATS)
    for c, tf32 in (
        (Case(8192, 2304, 256000, BF16, SOFTCAP, tokens=4096), False),
        (Case(8192, 1024, 151936, BF16, "addcol:0", tokens=4096), False),
        (Case(8192, 1024, 151936, F16, tokens=4096), False),
        (Case(2048, 1024, 32000, F32), True),
        (Case(2048, 1024, 32000, F32), False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        head = make_head(c, "cuda")
        g = make_grads(c, head)._replace(square=None)
        win = Windows(c.tokens or c.n, c.v, c.dtype)
        z = torch.empty(c.tokens or c.n, c.v, dtype=c.dtype, device="cuda")
        x = head.h[: len(z)]

        def loss(head: Head = head, g: RowGrads = g, win: Windows = win) -> object:
            return engine.head_loss(head, g, OPERANDS, win)[0]

        def stats(want: frozenset[str], head: Head = head, win: Windows = win) -> object:
            return engine.head_stats(head, want, win)

        t = medians(
            {
                "h wT": partial(torch.mm, x, head.w.t(), out=z),
                "forward": partial(stats, frozenset({"lse", "picked"})),
                "all statistics": partial(stats, everything),
                "loss": loss,
            },
            rounds=2,
        )
        t["h wT"] *= c.n / len(z)
        times = "  ".join(f"{name} {ms:.2f} ms" for name, ms in t.items())
        print(f"{c}{' tf32' if tf32 else ''}: {times}", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--shapes", default="", help="comma-separated beginnings of shape names, all by default")
    parser.add_argument("--tokens", default="8192,4096", help="rows of a window of the one-sweep loss")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    if options.variants:
        return time_variants()
    for shape in SHAPES:
        if shape[0].startswith(tuple(options.shapes.split(","))):
            time_shape(*shape, windows=tuple(int(m) for m in options.tokens.split(",")))
    return None


if __name__ == "__main__":
    main()

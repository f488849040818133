"""Times the sweeping kernels alone over candidate tiles: where the rows of the tile table come from.

    python benchmarks/gpu_tiles.py --kernel exp --shapes gpt2,qwen3 [--warm 12]

Prints, per shape, each tile's milliseconds and TFLOP/s beside cuBLAS's bare h wᵀ on the same tokens.
``--warm n`` first compiles every candidate with n processes at once (they share Triton's cache on disk).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch

from fusedhead.kernels.triton_engine.launch.tiles import Tile
from fusedhead.kernels.triton_engine.launch.tuning import fastest, make_head, step_of, tiles_to_time

SHAPES = {
    "llama3": (4096, 4096, 128256),
    "gemma2": (4096, 2304, 256000),
    "qwen3": (4096, 1024, 151936),
    "gpt2": (4096, 768, 50304),
    "gpt2-all": (16384, 768, 50304),
    "llama2": (2048, 4096, 32000),
    "few": (512, 4096, 128256),
    "one": (1, 4096, 128256),
}


def clock(step: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(step, warmup=15, rep=80, return_mode="median"))


def told(tile: Tile, problem: Exception) -> None:
    print("  ", tile, type(problem).__name__, str(problem)[:80])


def sweep_tiles(options: argparse.Namespace, share: tuple[int, int] | None) -> None:
    """Time every candidate, or (with a share i of n) only compile and run every n-th one once."""
    from triton.testing import do_bench

    for name in options.shapes.split(","):
        n, d, v = SHAPES[name]
        head = make_head(n, d, v, transform=options.transform)
        for kernel in options.kernel.split(","):
            tiles = tiles_to_time(kernel, n, tuple(int(g) for g in options.groups.split(",")))
            if share:
                for tile in tiles[share[0] :: share[1]]:
                    step_of(kernel, head, tile)()
                continue
            z = torch.empty(n, v, device="cuda", dtype=torch.bfloat16)
            gflop = 2e-9 * n * d * v
            bare = do_bench(lambda z=z, head=head: torch.mm(head.h, head.w.t(), out=z), warmup=25, rep=100)
            del z
            best: dict[Tile, float] = {}
            for ms, tile in fastest(kernel, head, tiles * options.rounds, clock, told):
                best[tile] = min(ms, best.get(tile, ms))
            times = sorted((ms, tile) for tile, ms in best.items())
            print(f"{kernel} {name} {n, d, v}: cuBLAS {bare:.3f} ms ({gflop / bare:.0f})", flush=True)
            for ms, t in times[: options.top]:
                shape = f"{t.BM}x{t.BN}x{t.BK} group {t.group}, {t.stages} stages"
                rest = "in pairs" if t.paired else f"flatten {t.flatten}, parts {t.parts}"
                print(f"   {ms:.3f} ms ({gflop / ms:.0f}) {bare / ms:.3f}  {shape}, {rest}", flush=True)
        del head
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="stream,exp,dlogits")
    parser.add_argument("--shapes", default="llama3,qwen3,gpt2")
    parser.add_argument("--transform", default="")
    parser.add_argument("--groups", default="6,11,12,22")
    parser.add_argument("--rounds", type=int, default=2, help="times each tile is timed; the least counts")
    parser.add_argument("--top", type=int, default=6)
    parser.add_argument("--warm", type=int, default=0)
    parser.add_argument("--share", default="", help="i/n: compile only the i-th of n shares (used by --warm)")
    options = parser.parse_args()
    if options.share:
        i, n = options.share.split("/")
        return sweep_tiles(options, (int(i), int(n)))
    if options.warm:
        command = [sys.executable, *sys.argv, "--share"]
        for worker in [subprocess.Popen([*command, f"{i}/{options.warm}"]) for i in range(options.warm)]:
            worker.wait()
    return sweep_tiles(options, None)


if __name__ == "__main__":
    main()

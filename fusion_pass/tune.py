"""``fusedhead tune``, ``python -m fusedhead.tune``: finds the fastest tiles for this machine's GPU and saves them.

The checked-in tiles were timed on an H100; another chip uses them or safe ones. Tuning takes some minutes once, and
every later process on the machine reads the result. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

Clock = Callable[[Callable[[], object]], float]  # a step -> milliseconds
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", default="768,1024,2048,4096,8192", help="sizes; a tile serves up to its own")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="fp16 uses what bf16 found: both take two bytes"
    )


def main(arguments: Sequence[str] | None = None, clock: Clock | None = None) -> int:
    """Tune, print and save the tiles; returns the exit code."""
    command = argparse.ArgumentParser(prog="python -m fusedhead.tune", description=__doc__)
    add_arguments(command)
    return execute(command.parse_args(arguments), command, (), clock)


def execute(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser, rest: Sequence[str], clock: Clock | None = None
) -> int:
    if not torch.cuda.is_available():
        print("fusedhead: no GPU here: there are no tiles to tune on a CPU", file=sys.stderr)
        return 2

    from fusedhead.kernels.triton_engine.launch import tuned_tiles, tuning
    from fusedhead.kernels.triton_engine.launch.sweep import sweep
    from fusedhead.kernels.triton_engine.launch.tiles import pairs_serve

    device, dtype, rows = torch.device("cuda", torch.cuda.current_device()), DTYPES[arguments.dtype], []
    print(tuned_tiles.device_key(device))
    pairs = pairs_serve(device)
    for hidden in sorted(int(size) for size in arguments.hidden.split(",")):
        head = tuning.make_head(arguments.tokens, hidden, arguments.vocab, "cuda", dtype)
        for kernel in tuned_tiles.KERNELS:
            tma = sweep(kernel, head).layout.tma
            tiles = tuning.tiles_to_time(kernel, arguments.tokens, tuning.GROUPS, tma, pairs)
            times = tuning.fastest(kernel, head, tiles, clock or tuning.timed)
            if not times:
                print(f"fusedhead: no tile of {kernel} fits this GPU at hidden size {hidden}", file=sys.stderr)
                return 1
            alone = next((item for item in times if not item[1].paired), times[0])
            for ms, tile in dict.fromkeys((times[0], alone)):  # heads that no pair of warpgroups serves use the second
                rows.append(tuned_tiles.Tuned(kernel, dtype.itemsize, tma, hidden, tile))
                print(f"  {kernel}, hidden size {hidden}: {ms:.3f} ms with {tile}", flush=True)
    print(f"kept in {tuned_tiles.keep_tiles(tuned_tiles.device_key(device), rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

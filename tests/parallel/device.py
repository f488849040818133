"""``torchrun --nproc-per-node N -m tests.parallel.device [--backend nccl] [--device cuda] [--names "a|b"] [--small]``

The arrangements of this folder on the devices of one host, in bfloat16 and float32, against one process in eager mode:
a short table, and parallel_matrix.json in ``--out``. ``--backend gloo --device cuda``: several ranks on one GPU. Our
error must not be above 1.5 times torch's own in the same dtype, or a few units of float32; in bfloat16 these are root
mean squares over seeds. Exit status 1 where one is, where a head that must be fused is not, or where the collectives
differ from those that are expected.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.parallel import gloo_on_cuda
from tests.parallel.arrangements import ARRANGEMENTS, THROUGH_INDUCTOR, outcomes
from tests.parallel.compared import errors, errors_of_rounding
from tests.parallel.models import Setting

NCCL = {"allreduce_", "_allgather_base_", "_reduce_scatter_base_"}
HEADS_OF_FSDP = "FSDP2"  # whose own collectives differ by torch
SEEDS = 4  # of a program in two bytes: the largest error of one is luck
IN_WINDOWS = "several windows"  # one gather a window: their number there is that of the CPU's plan


def outcome(name: str, setting: Setting) -> dict[str, Any]:
    """A row of the table, equal on all ranks but for the errors."""
    arrangement, started = ARRANGEMENTS[name], time.perf_counter()
    rounded = setting.dtype.itemsize == 2 and not setting.inductor
    settings = [setting._replace(seed=seed) for seed in range(SEEDS if rounded else 1)]
    several = [outcomes([name], each)[name] for each in settings]
    ours = next((each for each in several if isinstance(each, str)), several[0])
    row: dict[str, Any] = {
        "name": name,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "inductor": setting.inductor,
    }
    if isinstance(ours, str):
        return row | {"ok": False, "why": ours}
    actual = errors_of_rounding(name, settings, several) if rounded else errors(name, setting, ours)
    row["errors"] = actual
    what, error, allowed = max(actual, key=lambda each: each[1] / max(each[2], 1e-30))
    wrong = [] if error <= allowed else [f"{what}: {error:.3g} > {allowed:.3g}"]
    for fused, reason, _, _ in ours["heads"]:
        if fused != (not arrangement.left):
            wrong.append(reason or "fused")
    counts = {part: {k: n for k, n in ours[part].items() if k in NCCL} for part in ("forward", "backward")}
    if arrangement.forward is not None and setting.count and not name.startswith(HEADS_OF_FSDP):
        for part in counts:
            expected = {k: n for k, n in getattr(arrangement, part).items() if k in NCCL}
            windows = name.startswith(IN_WINDOWS) and setting.device != "cpu"
            if counts[part] != expected and not (windows and counts[part].keys() == expected.keys()):
                wrong.append(f"{part}: {counts[part]} instead of {expected}")
    worst = {"worst": what, "error": error, "allowed": allowed, "heads": ours["heads"], "collectives": counts}
    return row | worst | {"ok": not wrong, "why": "; ".join(wrong), "seconds": time.perf_counter() - started}


def programs(device: str, small: bool) -> list[tuple[Setting, Iterable[str]]]:
    """What is run, the most important first."""
    sizes = {"device": device} if small else {"device": device, "depth": 256, "batch": 8, "time": 128, "scale": 64}
    base = Setting(**sizes)  # type: ignore[arg-type]
    return [
        (base._replace(dtype=torch.bfloat16), ARRANGEMENTS),
        (base._replace(dtype=torch.bfloat16, inductor=True, count=False), THROUGH_INDUCTOR),
        (base, ARRANGEMENTS),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="nccl" if torch.cuda.is_available() else "gloo")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda with NCCL, the CPU with gloo")
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--names", default="")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--begin", type=int, default=0, help="programs that are left out, those that come first")
    parser.add_argument("--seconds", type=float, default=95.0, help="no arrangement is begun after so many")
    arguments = parser.parse_args()
    rank, started = int(os.environ["RANK"]), time.monotonic()
    device = arguments.device or ("cuda" if arguments.backend == "nccl" else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if arguments.backend == "gloo":
            gloo_on_cuda.serve()
    dist.init_process_group(arguments.backend, timeout=timedelta(seconds=120))
    torch.backends.cuda.matmul.allow_tf32 = False
    rows, skipped, count = [], 0, 0
    for setting, chosen in programs(device, arguments.small):
        names = arguments.names.split("|") if arguments.names else chosen
        for name in names:
            count += 1
            if count <= arguments.begin:
                continue
            late = torch.tensor(float(time.monotonic() - started > arguments.seconds), device=device)
            dist.all_reduce(late)  # alike on all ranks
            if late.item():
                skipped += 1
                continue
            row = outcome(name, setting)
            good = torch.tensor(float(row["ok"]), device=device)
            dist.all_reduce(good, op=dist.ReduceOp.MIN)
            row["ok_on_all_ranks"] = bool(good.item())
            rows.append(row)
            if rank == 0 or not row["ok"]:
                figures = f"{row['error']:.2e} <= {row['allowed']:.2e}" if "error" in row else ""
                how = "Inductor" if setting.inductor else "aot_eager"
                said = "" if row["ok"] else f"  rank {rank}: {row['why'][:1500]}"
                print(
                    f"{name:34} {row['dtype']:9} {how:9} {'ok' if row['ok'] else 'FAIL':4} {figures}{said}", flush=True
                )
    if rank == 0:
        told = {
            "torch": torch.__version__,
            "ranks": dist.get_world_size(),
            "backend": arguments.backend,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "skipped": skipped,
        }
        Path(arguments.out, "parallel_matrix.json").write_text(json.dumps(told | {"rows": rows}, indent=1))
        failed = sum(not row["ok_on_all_ranks"] for row in rows)
        print(
            f"{len(rows)} programs, {failed} failed, {skipped} not begun, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    bad = any(not row["ok_on_all_ranks"] for row in rows)
    dist.barrier()
    dist.destroy_process_group()
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())

"""What each rank runs in `test_parallel_benchmark`."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks import measure, parallel

SMOKE = ["--smoke", "--device", "cpu", "--seconds", "0.05"]


def smoke() -> dict[str, Any]:
    """The rows as this rank has them, and the files that rank 0 writes."""
    measure.TURN_SECONDS = 0.001  # in this process: one step a turn
    with tempfile.TemporaryDirectory() as folder:
        rows = parallel.main([*SMOKE, "--out", folder])
        files = {file.name: file.read_text() for file in sorted(Path(folder).iterdir())}
    return {"rank": dist.get_rank(), "rows": [dataclasses.asdict(row) for row in rows], "files": files}

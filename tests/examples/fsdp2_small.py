"""The FSDP2 example on a rank that has a process group, its graphs rewritten and executed as they are."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import fsdp2
import torch.distributed as dist

from fusedhead import backend
from tests.eager_stack import as_it_is

OPTIONS = "--vocab 300 --length 16 --steps 3"


def train() -> tuple[list[float], str]:
    """The losses, and what this rank prints."""
    backend.Inductor = lambda *_: as_it_is  # type: ignore[assignment, misc]
    dist.init_process_group = dist.destroy_process_group = lambda *_: None  # type: ignore[assignment]
    with redirect_stdout(io.StringIO()) as said:
        return fsdp2.main(OPTIONS.split()), said.getvalue()

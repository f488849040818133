"""A kernel that counts its launches, without a GPU, for the tests of launches and of launchers."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")

from fusedhead.kernels.triton_engine.launch import launch as triton_launch
from fusedhead.kernels.triton_engine.launch.launch import Launch


class Kernel:
    """Counts how it is launched: through Triton (with what options), or again."""

    arg_names = ("x", "at", "N", "BLOCK")

    def __init__(self) -> None:
        self.through_triton: list[tuple] = []
        self.again: list[tuple] = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.through_triton.append((grid, args, options))
            return {grid: lambda *args, stream: self.again.append((grid, args, stream))}

        return launch


class Active:
    def get_current_device(self) -> int:
        return 3

    def get_current_stream(self, device: int) -> int:
        return 100 + device


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    monkeypatch.setattr(triton_launch, "driver", type("Driver", (), {"active": Active()}))


def bound() -> tuple[Kernel, Launch]:
    kernel = Kernel()
    return kernel, Launch(kernel, (4, 1, 1), {"BLOCK": 64, "N": 10, "other": 1, "num_warps": 8})

"""A remembered launch passes what Triton's own would, and only where the same compiled kernel applies."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

from fusedhead.kernels import triton_launch
from fusedhead.kernels.triton_launch import Launch


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


def test_the_first_launch_goes_through_triton_and_later_ones_do_not():
    kernel, launch = bound()
    x, y = torch.zeros(8), torch.ones(8)
    launch(x, 5)
    launch(y, 6)
    assert kernel.through_triton == [((4, 1, 1), (x, 5, 10, 64), {"num_warps": 8})]
    assert kernel.again == [((4, 1, 1), (y.data_ptr(), 6, 10, 64), 103)]


def test_a_pointer_that_is_not_aligned_goes_through_triton():
    kernel, launch = bound()
    x = torch.zeros(9)
    launch(x[1:], 0)
    launch(x, 0)
    launch(x[1:], 0)
    assert len(kernel.through_triton) == 3
    launch(x, 0)
    assert len(kernel.again) == 1


def test_nothing_is_remembered_of_an_interpreted_kernel(monkeypatch):
    _, launch = bound()
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *args, **options: None)
    launch(torch.zeros(8), 0)
    assert launch.run is None

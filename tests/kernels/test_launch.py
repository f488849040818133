"""A remembered launch passes what Triton's own would, and only where the same compiled kernel applies."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

from fusedhead.kernels.triton_engine.launch.launch import Launch, Placed
from tests.kernels.counted_launch import Kernel, bound, driver  # noqa: F401  driver is a fixture


def test_the_first_launch_goes_through_triton_and_later_ones_do_not():
    kernel, launch = bound()
    x, y = torch.zeros(8), torch.ones(8)
    launch.run(x=x, at=5)
    launch.run(x=y, at=6)
    assert kernel.through_triton == [((4, 1, 1), (x, 5, 10, 64), {"num_warps": 8, "enable_fp_fusion": True})]
    assert kernel.again == [((4, 1, 1), (y.data_ptr(), 6, 10, 64), 103)]


def test_a_pointer_that_is_not_aligned_goes_through_triton():
    kernel, launch = bound()
    x = torch.zeros(9)
    launch.run(x=x[1:], at=0)
    launch.run(x=x, at=0)
    launch.run(x=x[1:], at=0)
    assert len(kernel.through_triton) == 3
    launch.run(x=x, at=0)
    assert len(kernel.again) == 1


def test_a_pointer_that_is_not_given_has_the_address_of_one_that_is_and_a_name_that_the_kernel_lacks_is_left_out():
    kernel = Kernel()
    kernel.arg_names = ("lying", "flags", "x", "at", "N", "BLOCK")
    launch = Launch(kernel, (4, 1, 1), {"BLOCK": 64, "N": 10})
    x, lying = torch.zeros(8), Placed(Matrix("m"), torch.zeros(8))
    for _ in range(2):
        launch.run(at=0, x=x, flags=None, weights=torch.ones(8), lying=lying)
    ((_, args, _),), ((_, again, _),) = kernel.through_triton, kernel.again
    assert args == (("m", lying.data_ptr()), x, x, 0, 10, 64)
    assert again == (("m", lying.data_ptr()), x.data_ptr(), x.data_ptr(), 0, 10, 64)


def test_a_launch_without_a_tensor_names_what_it_needs():
    with pytest.raises(TypeError, match="needs x, at; given were at"):
        bound()[1].run(at=3)


def test_nothing_is_remembered_of_an_interpreted_kernel(monkeypatch):
    _, launch = bound()
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *args, **options: None)
    launch.run(x=torch.zeros(8), at=0)
    assert launch.again is None


class Matrix(NamedTuple):
    """How a matrix lies, and its descriptor."""

    name: str

    def at(self, base):
        return (self.name, base.data_ptr())


def test_every_launch_says_that_products_and_sums_are_fused():
    """Not left to a default of Triton's, which decides the rounding and changes with its version."""
    kernel, launch = bound()
    launch.run(x=torch.zeros(9)[1:], at=0)
    assert kernel.through_triton[0][2]["enable_fp_fusion"] is True

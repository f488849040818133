"""A launch again is one call into C, with what Triton would pass; a launcher that is not understood is left alone."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

from fusedhead.kernels.triton_engine.launch import launcher as triton_recorded
from fusedhead.kernels.triton_engine.launch.launch import Launch, Placed
from tests.kernels.counted_launch import Kernel, bound, driver  # noqa: F401  driver is a fixture


class Matrix(NamedTuple):
    """How a matrix lies, and its descriptor."""

    name: str

    def at(self, base):
        return (self.name, base.data_ptr())


def _in_c(calls: list, *args) -> None:
    calls.append(args)


class Launcher:
    """As Triton's: finds out again what is fixed, encodes descriptors, and calls into C."""

    def __init__(self, calls: list, encodings: list, as_tuple: bool) -> None:
        launcher = partial(_in_c, calls)

        def inner(*args):
            *fixed, given = args if as_tuple else (*args[:9], args[9:])
            encodings.append(given)
            given = [part for x in given for part in (("map", *x) if isinstance(x, tuple) else (x,))]
            return launcher(*fixed, tuple(given)) if as_tuple else launcher(*fixed, *given)

        self.launch, self.as_tuple, self.workspace = inner, as_tuple, None

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        given = (args,) if self.as_tuple else args
        self.launch(x, y, z, stream, function, metadata, self.workspace, enter, leave, *given)


@pytest.fixture(params=[True, False], ids=["3.9", "3.6"])
def launcher(request):
    """A launcher of that version, its calls into C, and what it encoded."""
    calls, encodings = [], []
    return Launcher(calls, encodings, request.param), calls, encodings


def compiled_with(launcher, monkeypatch) -> Launch:
    def through_triton(grid):
        compiled = type("Compiled", (), {"run": launcher, "function": 7, "packed_metadata": (8, 1, 0)})()
        type(compiled).__getitem__ = lambda self, grid: lambda *args, stream: None
        return lambda *args, **options: compiled

    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: through_triton(grid))
    monkeypatch.setattr(Kernel, "arg_names", ("h", "w", "x", "at", "N", "BLOCK"))
    return bound()[1]


def in_c(launcher, *given) -> tuple:
    fixed = (4, 1, 1, 103, 7, (8, 1, 0), None, None, None)
    return (*fixed, given) if launcher.as_tuple else (*fixed, *given)


def test_a_launch_again_is_one_call_into_c(launcher, monkeypatch):
    triton, calls, encodings = launcher
    launch = compiled_with(triton, monkeypatch)
    h, w, x = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    placed = Placed(Matrix("h"), h), Placed(Matrix("w"), w)
    for _ in range(3):
        launch.run(h=placed[0], w=placed[1], x=x, at=5)
    expected = in_c(triton, "map", "h", h.data_ptr(), "map", "w", w.data_ptr(), x.data_ptr(), 5, 10, 64)
    assert [tuple(call) for call in calls] == [expected] * 2
    assert len(encodings) == 1  # descriptors of the same memory are encoded once


def test_a_matrix_that_moved_has_another_descriptor(launcher, monkeypatch):
    triton, calls, encodings = launcher
    launch = compiled_with(triton, monkeypatch)
    h, x, lying = torch.zeros(64), torch.zeros(8), Matrix("h")
    for at in (0, 0, 4, 8, 4):
        launch.run(h=Placed(lying, h[at:]), w=Placed(lying, h), x=x, at=0)
    offsets = [(call[-1] if triton.as_tuple else call[9:])[2] - h.data_ptr() for call in calls]
    assert offsets == [0, 16, 32, 16]
    assert len(encodings) == 3


def test_whoever_is_told_of_launches_is_told_of_all(launcher, monkeypatch):
    triton, calls, _ = launcher
    launch = compiled_with(triton, monkeypatch)
    x = torch.zeros(8)
    launch.run(x=x, at=0)
    monkeypatch.setattr(triton_recorded.knobs.runtime.launch_enter_hook, "calls", [print])
    launch.run(x=x, at=0)
    assert not calls


def test_a_launch_that_needs_a_workspace_is_left_to_triton(launcher, monkeypatch):
    triton, calls, _ = launcher
    triton.workspace = torch.zeros(1)
    launch = compiled_with(triton, monkeypatch)
    x = torch.zeros(8)
    launch.run(x=x, at=0)
    assert callable(launch.again)
    launch.run(x=x, at=0)
    assert not calls


@pytest.mark.parametrize("added", [("more",), ()])
def test_a_launcher_that_passes_other_arguments_is_left_to_triton(launcher, monkeypatch, added):
    """As a sanitizer's does, or one of a Triton to come."""
    triton, calls, _ = launcher

    class Changed(Launcher):
        def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
            args = (*args, *added) if added else tuple(reversed(args))
            super().__call__(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args)

    other = Changed(calls, [], triton.as_tuple)
    launch = compiled_with(other, monkeypatch)
    x = torch.zeros(8)
    launch.run(x=x, at=0)
    launch.run(x=x, at=0)
    assert not calls


def test_a_remembered_launch_keeps_its_kernel_loaded(launcher, monkeypatch):
    launch = compiled_with(launcher[0], monkeypatch)
    launch.run(x=torch.zeros(8), at=0)
    assert launch.again.compiled.function == 7

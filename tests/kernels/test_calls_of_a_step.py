"""What a step of a head asks of the host: of few tokens, launches and allocations cost more than they compute."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is published for Linux only")

from triton.runtime.interpreter import GridExecutor

from benchmarks import host_share
from fusedhead.kernels.contract import Head, Needs, RowGrads, Windows
from fusedhead.kernels.transform.transform import parse
from fusedhead.kernels.triton_engine import engine
from fusedhead.kernels.triton_engine.launch.launch import Launch

N, V, D = 64, 128, 32
BF16 = torch.bfloat16
NEW = {"aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default"}
VIEWS = {"aten.slice.Tensor", "aten.select.int", "aten.view.default"}


class Calls(TorchDispatchMode):
    """Counts the calls that reach ATen."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def of(self, names: set[str]) -> int:
        return sum(self.count[name] for name in names)


@pytest.fixture
def launched(monkeypatch):
    """The names of kernels in the order of their launches, none of which runs."""
    names: list[str] = []
    name_of = lambda kernel: getattr(kernel, "fn", kernel).__name__.removesuffix("_kernel")  # noqa: E731
    monkeypatch.setattr(Launch, "run", lambda self, **inputs: names.append(name_of(self.kernel)))
    return names


def head() -> Head:
    h, w = torch.zeros(N, D, dtype=BF16), torch.zeros(V, D, dtype=BF16)
    return Head(h, w, torch.zeros(N, 1, dtype=torch.int64), *(torch.empty(0) for _ in range(3)), parse(""))


def test_a_training_step_is_nine_launches_thirteen_allocations_and_no_view(launched):
    c = RowGrads(torch.ones(N), torch.ones(N, 1))
    operands = head()
    with Calls() as calls:
        engine.head_loss(operands, c, Needs(True, True, False, False), Windows(N, V, BF16))
    redo = ["check", "stream", "merge", "exp"]
    assert launched == ["map_labels", "reference", "exp", *redo, "finalize", "scale"]
    assert calls.of(NEW) == 13  # one of them for the second number of the lse
    assert calls.of(VIEWS) == 0


def test_the_statistics_are_four_launches_and_five_allocations(launched):
    operands = head()
    with Calls() as calls:
        engine.head_stats(operands, frozenset({"lse", "picked"}), Windows(N, V, BF16))
    assert launched == ["check_labels", "map_labels", "stream", "merge"]
    assert calls.of(NEW) == 5
    assert calls.of(VIEWS) == 0


ENTERED = {  # Python functions that a call enters
    "engine loss": 164,
    "the op": 204,
    "engine statistics": 67,
    "the op of statistics": 107,
}


@pytest.mark.parametrize("part", ENTERED)
def test_a_call_enters_no_more_python_functions_than_it_did(part):
    """On a GPU each costs about as much as an argument of a launch; newer versions of Python inline some."""
    compiled = lambda self, *args, **options: host_share.Compiled()  # noqa: E731  no kernel is interpreted
    with host_share.launching_nothing(), patch.object(GridExecutor, "__call__", compiled):
        step = host_share.ops_of_a_step()[part]
        for _ in range(3):
            step()
        python, _ = host_share.entered(step)
    assert 0 < python <= ENTERED[part]

"""Heads as every CPU multiplies them: no outcome depends on the machine that runs a test."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels.torch_engine import cpp_library
from tests.lowering.heads import MULTIPLIED, multiplies


def name(pair: tuple[torch.dtype, torch.dtype]) -> str:
    dtype, products = (str(dtype).removeprefix("torch.") for dtype in pair)
    return dtype if dtype == "float32" else f"{dtype} {'multiplied' if dtype == products else 'widened'}"


@pytest.fixture(params=MULTIPLIED, ids=name)
def multiplied(request, monkeypatch) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of a head and that of its products."""
    multiplies(monkeypatch, *request.param)
    return request.param


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["multiplies bfloat16", "widens bfloat16"])
def any_cpu(request, monkeypatch) -> None:
    """A CPU that multiplies bfloat16, and one that does not."""
    multiplies(monkeypatch, torch.bfloat16, request.param)


@pytest.fixture(params=[0, 2], ids=["torch ops", "C++ kernel"])
def kernel_threads(request, monkeypatch) -> int:
    """A CPU without a compiler, and one whose C++ kernel has two threads."""
    monkeypatch.setattr(cpp_library, "library", lambda: object() if request.param else None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param

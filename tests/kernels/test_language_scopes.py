"""The interpreter without work that has no result: Triton's language is put back after a launch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

import triton.language as tl
from triton.runtime import interpreter

from fusedhead.kernels.contract import Windows
from fusedhead.kernels.triton_engine import engine
from tests.kernels import language_scopes
from tests.kernels.interpreted import F32, OPERANDS, gradients, head

# numpy speaks up where a GPU stays silent
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def launched() -> None:
    engine.head_loss(head(n=8, v=20), gradients(8), OPERANDS, Windows(16, 32, F32))


def test_a_launch_leaves_the_language_as_it_found_it() -> None:
    before = [(owner, dict(vars(owner))) for owner in (tl, tl.core, tl.math)]
    launched()
    assert not [name for owner, had in before for name in had if vars(owner)[name] is not had[name]]


def test_to_quicken_twice_is_to_quicken_once() -> None:
    result = interpreter._patch_lang
    language_scopes.quicken()
    assert interpreter._patch_lang is result

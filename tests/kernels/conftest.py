"""Heads as every CPU multiplies them: the fixtures of the ops, for the engines."""

from __future__ import annotations

from importlib.util import find_spec

from tests.kernels.language_scopes import quicken
from tests.lowering.conftest import any_cpu, multiplied

__all__ = ["any_cpu", "multiplied"]

if find_spec("triton"):
    quicken()
    from tests.kernels.fused_multiply_add import round_once  # it imports Triton

    round_once()

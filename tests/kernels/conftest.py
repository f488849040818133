"""Heads as every CPU multiplies them: the fixtures of the ops, for the engines."""

from __future__ import annotations

from tests.lowering.conftest import any_cpu, multiplied

__all__ = ["any_cpu", "multiplied"]

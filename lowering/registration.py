"""Registers an op of ``torch.ops.fusedhead``: schema, implementation, shapes under fake tensors, derivative."""

from __future__ import annotations

import torch

from fusedhead.lowering.ranges import AnyFunction


def register_op(
    name: str,
    schema: str,
    implementation: AnyFunction,
    fake: AnyFunction,
    derivative: tuple[AnyFunction, AnyFunction] | None = None,
) -> None:
    """``derivative``: what saves for the backward, and the backward; None for an op that autograd passes by."""
    op = f"fusedhead::{name}"
    torch.library.define(op, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(op, "default", implementation)
    torch.library.register_fake(op, fake)
    if derivative is not None:
        setup, backward = derivative
        torch.library.register_autograd(op, backward, setup_context=setup)

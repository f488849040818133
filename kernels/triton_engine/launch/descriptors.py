"""TMA descriptors, whose shape and strides are checked once for all matrices of one layout.

Gluon's descriptors hold one thing more than Triton's: the layout of a tile in shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def _described(paired: bool) -> tuple[Any, tuple[Any, ...]]:
    """(descriptor class, its further arguments): Gluon's class takes the layout of a tile in shared memory."""
    if not paired:
        return TensorDescriptor, ()
    from triton.experimental.gluon.language import NVMMASharedLayout  # imported only where pairs of warpgroups run
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as WithLayout

    return WithLayout, (NVMMASharedLayout(128, 16, rank=2),)


class Tiles:
    """The TMA descriptors of matrices of one layout: Triton checks the first, the others differ in their address."""

    __slots__ = ("described", "fields")

    def __init__(
        self, base: Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int], paired: bool
    ) -> None:
        self.described, more = _described(paired)
        checked = self.described(base, list(shape), list(strides), block, *more)
        self.fields = {**vars(checked), "base": None}  # without the tensor, which would stay alive

    def at(self, base: Tensor) -> Any:
        """The descriptor of the matrix that starts at the address of ``base``, a multiple of 16 bytes."""
        made = self.described.__new__(self.described)
        vars(made).update(self.fields)
        made.base = base
        return made

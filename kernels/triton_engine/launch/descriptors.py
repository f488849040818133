"""TMA descriptors of matrices that lie alike, checked once.

What a descriptor is made of differs between Triton's own kernels and Gluon's, which say how a tile lies in shared
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def _described(paired: bool) -> tuple[Any, tuple[Any, ...]]:
    """The class of a tile's TMA descriptors, and what it takes besides: how a tile lies in shared memory."""
    if not paired:
        return TensorDescriptor, ()
    from triton.experimental.gluon.language import NVMMASharedLayout  # where pairs serve only
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as WithLayout

    return WithLayout, (NVMMASharedLayout(128, 16, rank=2),)


class Tiles:
    """TMA descriptors of matrices that lie alike: Triton checks the first, the others differ in their address."""

    __slots__ = ("described", "fields")

    def __init__(
        self, base: Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int], paired: bool
    ) -> None:
        self.described, more = _described(paired)
        checked = self.described(base, list(shape), list(strides), block, *more)
        self.fields = {**vars(checked), "base": None}  # no tensor is kept alive here

    def at(self, base: Tensor) -> Any:
        """The descriptor of a matrix that starts where ``base`` does, at a multiple of 16 bytes."""
        made = self.described.__new__(self.described)
        vars(made).update(self.fields)
        made.base = base
        return made

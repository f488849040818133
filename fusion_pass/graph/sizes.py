"""Sizes of tensors, which may be symbols: comparisons at compile time that add no guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq


def static(size: Any) -> int | None:
    """The value of a size known at compile time."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else int(size)


def same_size(a: Any, b: Any) -> bool:
    return statically_known_true(sym_eq(a, b))


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))

"""Row picks by constants of the program: ``z[i]``, ``z[:, 3:7]``, ``z.split(128, 1)``, ``for row in z``.

The constants differ from call to call and do not affect a reading. They are therefore removed from the program: each
pick becomes an ``index_select`` with a tensor of row numbers, and all calls of one form share a reading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fusedhead.graph.nodes import every_dimension


class Pick(NamedTuple):
    """Positions along one dimension; with ``drop`` there is one, and the dimension goes."""

    dim: int
    rows: range
    drop: bool


Picks = list[list[Pick]]  # for each result


def by_index(shape: Sequence[int], index: Any) -> Picks | None:
    """``z[index]`` with whole numbers, slices and an ellipsis; None where it is anything else, or a mere shift."""
    entries = index if isinstance(index, tuple) else (index,)
    if any(type(e) not in (int, slice, type(Ellipsis)) for e in entries) or entries.count(Ellipsis) > 1:
        return None
    full = every_dimension(index, len(shape))
    if len(full) > len(shape):
        return None
    by_dimension = []
    for dim, (entry, size) in enumerate(zip(full, shape)):
        if isinstance(entry, int):
            if not -size <= entry < size:
                return None
            by_dimension.append(Pick(dim, range(size)[entry : entry + 1 or None], True))
        elif any(type(bound) not in (int, type(None)) for bound in (entry.start, entry.stop, entry.step)):
            return None
        elif range(size)[entry] != range(size):
            by_dimension.append(Pick(dim, range(size)[entry], False))
    numbers = [b for e in entries if isinstance(e, slice) for b in (e.start, e.stop, e.step) if b is not None]
    if all(-1 <= n <= 1 for n in numbers) and not any(isinstance(e, int) for e in entries):
        return None  # [:-1], [1:]: the same for every size, and a slice of h needs no copy
    return [by_dimension] if by_dimension else None


def split_picks(shape: Sequence[int], split_size: Any, dim: int = 0) -> Picks:
    size, pieces, begin = shape[dim], [], 0
    sizes = [split_size] * -(-size // split_size) if isinstance(split_size, int) else list(split_size)
    for length in sizes:
        pieces.append([Pick(dim % len(shape), range(begin, min(begin + length, size)), False)])
        begin += length
    return pieces


def chunk(shape: Sequence[int], chunks: int, dim: int = 0) -> Picks:
    return split_picks(shape, -(-shape[dim] // chunks), dim)


def unbind(shape: Sequence[int], dim: int = 0) -> Picks:
    return [[Pick(dim % len(shape), range(i, i + 1), True)] for i in range(shape[dim])]


def narrow(shape: Sequence[int], dim: int, start: int, length: int) -> Picks:
    start = start % shape[dim] if start < 0 else start
    return [[Pick(dim % len(shape), range(start, start + length), False)]]


def select(shape: Sequence[int], dim: int, index: int) -> Picks:
    index = index % shape[dim]
    return [[Pick(dim % len(shape), range(index, index + 1), True)]]


PICKS: dict[str, Callable[..., Picks | None]] = {
    "__getitem__": by_index,
    "split": split_picks,
    "split_with_sizes": split_picks,
    "chunk": chunk,
    "unbind": unbind,
    "narrow": narrow,
    "select": select,
}


def picks(name: str, shape: Sequence[int], args: Sequence[Any], kwargs: dict[str, Any]) -> Picks | None:
    """The rows that each result of a call consists of, or None where the call is to be read as it stands."""
    if name not in PICKS:
        return None
    try:
        return PICKS[name](shape, *args, **kwargs)
    except (TypeError, ZeroDivisionError, IndexError):  # arguments of another form; the call itself will complain
        return None

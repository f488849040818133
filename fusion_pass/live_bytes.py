"""Peak bytes of the tensors of given sizes that are alive together while a program runs op by op.

Storages are watched from the op that returns them until they are freed, on real or fake tensors.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor

from fusedhead.compat import TorchDispatchMode, tree_leaves


class LiveSize(NamedTuple):
    """The size of logits [N, V], in any shape, also without the last token of every sequence. A weight's gradient does
    not match.
    """

    tokens: int
    hidden: int
    vocab: int

    def fits(self, value: Tensor) -> bool:
        if self.vocab not in value.shape or tuple(value.shape) in self.weights():
            return False
        return 7 * self.tokens * self.vocab <= 8 * value.numel() <= 8 * self.tokens * self.vocab

    def weights(self) -> tuple[tuple[int, int], ...]:
        if self.tokens == self.hidden:  # sizes do not tell [D, V] from [N, V]
            return ((self.vocab, self.hidden),)
        return (self.vocab, self.hidden), (self.hidden, self.vocab)


class LiveBytes(TorchDispatchMode):
    """``with live:`` counts allocations inside it. Frees are counted everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[LiveSize, tuple[int, int]] = {}  # bytes alive, and their peak
        self.known: dict[int, Any] = {}  # storages that are counted, by id

    def watch(self, size: LiveSize) -> None:
        self.sizes.setdefault(size, (0, 0))

    def peak_of(self, size: LiveSize) -> int:
        return self.sizes.get(size, (0, 0))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        if any(size.fits(value) for size in self.sizes for value in results):
            operands = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for value in results:  # a view, or the result of a write in place, allocates nothing
                if id(value.untyped_storage()) not in operands:
                    self.see(value)
        return out

    def see(self, value: Tensor) -> None:
        for size in self.sizes:
            if size.fits(value):
                storage = value.untyped_storage()
                if id(storage) not in self.known:
                    self.count(size, storage, storage.nbytes())
                return

    def count(self, key: LiveSize, storage: Any, size: int) -> None:
        alive, peak = self.sizes[key]
        self.sizes[key] = alive + size, max(peak, alive + size)
        identity = id(storage)

        def freed(_: Any) -> None:
            self.known.pop(identity, None)
            alive, peak = self.sizes[key]
            self.sizes[key] = alive - size, peak

        self.known[identity] = weakref.ref(storage, freed)

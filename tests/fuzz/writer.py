"""Writing a random program: fresh names, nested blocks, choices, and what is known of its values.

`grammar` decides what to write; this file only keeps the books. Every choice comes from one seeded generator, so a
seed is a program.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tests.fuzz.program import Block, Case, Statement


@dataclass(frozen=True)
class Rows:
    """Tensors with one entry a token, aligned with the logits: labels (``ignore`` or in [0, V)) and a mask."""

    y: str
    m: str
    rank: int


@dataclass(frozen=True)
class Logits:
    name: str
    rank: int
    class_dim: int
    vocab: int
    rows: Rows
    floating: str = "same"  # "low" once rounded to bfloat16


@dataclass
class Writer:
    rng: random.Random
    sizes: dict[str, int]
    dtype: str
    ignore: int
    inputs: dict[str, str] = field(default_factory=dict)
    returns: list[str] = field(default_factory=list)
    decisions: set[str] = field(default_factory=set)
    stack: list[list[Statement]] = field(default_factory=lambda: [[]])
    count: int = 0

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, options: Sequence[Any]) -> Any:
        return self.rng.choice(options)

    def weighted(self, table: Sequence[tuple[int, Any]]) -> Any:
        return self.rng.choices([each for _, each in table], [weight for weight, _ in table])[0]

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def line(self, text: str) -> None:
        self.stack[-1].append(text)

    def let(self, prefix: str, expression: str) -> str:
        name = self.fresh(prefix)
        self.line(f"{name} = {expression}")
        return name

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        self.stack.append([])
        yield
        body = self.stack.pop()
        self.line_block(Block(header, tuple(body) or ("pass",)))

    def line_block(self, block: Block) -> None:
        self.stack[-1].append(block)

    def maybe(self, p: float, header: str) -> Any:
        """``header`` around what follows, with probability p."""
        return self.block(header) if self.chance(p) else nothing()

    def input(self, prefix: str, expression: str) -> str:
        name = prefix if prefix not in self.inputs else self.fresh(prefix)
        self.inputs[name] = expression
        return name

    def floats(self, prefix: str, shape: str, *, grad: float = 0.0, scale: float = 1.0) -> str:
        """A floating input of the program's dtype."""
        suffix = ".requires_grad_()" if self.chance(grad) else ""
        times = f" * {scale}" if scale != 1.0 else ""
        return self.input(prefix, f"(torch.randn({shape}){times}).to(dtype){suffix}")

    def give(self, name: str, *, decision: bool = False) -> None:
        """Return a value from the program."""
        self.returns.append(name)
        if decision:
            self.decisions.add(name)

    def case(self, **options: Any) -> Case:
        return Case(
            self.sizes,
            dict(self.inputs),
            tuple(self.stack[0]),
            tuple(dict.fromkeys(self.returns)),
            dtype=self.dtype,
            decisions=frozenset(self.decisions),
            **options,
        )


@contextmanager
def nothing() -> Iterator[None]:
    yield


def renamed(logits: Logits, name: str, **changes: Any) -> Logits:
    return replace(logits, name=name, **changes)


Production = Callable[..., Any]

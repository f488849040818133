"""A torch.compile backend that runs the pass and then executes the rewritten graph eagerly.

The whole backend as users get it, with Inductor replaced by nothing: what the pass decided is tested in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fusedhead import Report
from fusedhead.backend import compile_graph
from fusedhead.options import split_options


def as_it_is(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """In the place of Inductor: the graph itself."""
    return gm.forward


def backend(
    observe: Callable[[Report], None], compiler: Callable[..., Any] = as_it_is, **options: Any
) -> Callable[..., Any]:
    """The pass and nothing else, or ``compiler`` after it; ``observe`` is given the report of every graph."""

    def compile_eagerly(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        settings, _ = split_options(options)
        return compile_graph(gm, example_inputs, settings, compiler, observe)

    return compile_eagerly


class Rewritten:
    """A function compiled with the pass alone; ``report`` says what has been done to its graphs so far.

    ``compile_options`` are those of ``torch.compile``; ``options`` those of the backend.
    """

    def __init__(self, fn: Callable[..., Any], options: dict[str, Any] | None = None, **compile_options: Any) -> None:
        self.report = Report()
        self.compiled = torch.compile(fn, backend=backend(self.report.extend, **(options or {})), **compile_options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)

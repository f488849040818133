"""A torch.compile backend that runs the pass and then executes the rewritten graph eagerly.

What the pass decided is tested in milliseconds: no AOTAutograd, no Inductor. It must not know what is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fusedhead import Report
from fusedhead.backend import run_pass
from fusedhead.options import split


def backend(observe: Callable[[Report], None]) -> Callable[..., Any]:
    """The pass and nothing else; ``observe`` is given the report of every graph."""

    def compile_eagerly(gm: GraphModule, example_inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
        own, _ = split(given.get("options"))
        rewritten, report, wrap = run_pass(gm, own)
        observe(report)
        return wrap(rewritten.forward)

    return compile_eagerly


class Rewritten:
    """A function compiled with the pass alone; ``report`` says what has been done to its graphs so far.

    ``compile_options`` are those of ``torch.compile`` (``dynamic=``, ``options=`` ...).
    """

    def __init__(self, fn: Callable[..., Any], **compile_options: Any) -> None:
        self.report = Report()
        self.compiled = torch.compile(fn, backend=backend(self.report.extend), **compile_options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)

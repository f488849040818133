"""A forward of `torch.nn.Linear` that returns deferred logits for a head in eager mode.

Dynamo traces it like torch's own: compiled code sees one branch. The code has the file and the lines of torch's
forward, so that tracebacks and graphs name the program's lines alone, and TorchScript reads torch's text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EagerProjection = Callable[[nn.Module, Tensor, Tensor, "Tensor | None"], Tensor]
LINEAR_NAMES = ("F", "linear", "weight", "bias")  # the names in torch's own forward


def forward_with(project: EagerProjection) -> Callable[[nn.Linear, Tensor], Tensor]:
    """A forward that makes eager calls through ``project(module, input, weight, bias)``.

    Raises RuntimeError where this torch has another forward, or another package has replaced it.
    """
    original = nn.Linear.forward
    names = getattr(getattr(original, "__code__", None), "co_names", None)
    if names != LINEAR_NAMES or original.__module__ != "torch.nn.modules.linear":
        raise RuntimeError("torch.nn.Linear.forward is not torch's own")

    # fmt: off
    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) if torch.compiler.is_compiling() else project(self, input, self.weight, self.bias)  # noqa: E501
    # fmt: on

    at = original.__code__
    forward.__code__ = forward.__code__.replace(co_filename=at.co_filename, co_firstlineno=returning(at) - 1)
    return wraps(original)(forward)


def tied_forward_with(project: EagerProjection, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same for a layer that is given its weight in the call."""

    @wraps(original)
    def forward(self: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return original(self, x, weight) if torch.compiler.is_compiling() else project(self, x, weight, None)

    return forward


def returning(code: object) -> int:
    """The last line of a function's text."""
    return max(line for *_, line in code.co_lines() if line is not None)  # type: ignore[attr-defined]

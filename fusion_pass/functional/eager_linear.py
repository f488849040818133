"""The forward of `torch.nn.Linear` that, in eager mode, asks first whether the layer is a head whose logits can wait.

Dynamo traces it as it traces torch's own: compiled code sees one branch, and the code stands at the place of torch's in
files and lines, so that tracebacks and graphs name the program's lines alone. TorchScript reads torch's text.
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
    """A forward by which eager calls are made by ``project(module, input, weight, bias)``.

    Raises RuntimeError where this torch's forward is not the one that is known, or somebody has replaced it.
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
    """The forward of a layer that is given its weight, by which eager calls are made by ``project``."""

    @wraps(original)
    def forward(self: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return original(self, x, weight) if torch.compiler.is_compiling() else project(self, x, weight, None)

    return forward


def returning(code: object) -> int:
    """The last line of a function's text."""
    return max(line for *_, line in code.co_lines() if line is not None)  # type: ignore[attr-defined]

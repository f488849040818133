"""Heads that the interpreter does not reach are reported with the reason: in a transform, or of another dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import B, D, T, V, hidden, labels, left, right, weight


def test_a_head_inside_a_function_transform_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        def loss(w: Tensor, h: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(h, w), y)

        return torch.func.grad(loss)(w, h, y)

    left(program, torch.randn(6, D), torch.randn(V, D), labels(6), because="torch.func")


def test_a_head_under_vmap_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return torch.func.vmap(lambda h, y: F.cross_entropy(F.linear(h, w), y))(h, y)

    left(program, torch.randn(B, T, D), torch.randn(V, D), labels(), because="inside a torch.func transform")


def test_a_function_transform_that_ended_before_the_head_does_not_matter() -> None:
    """Transformers makes attention masks with vmap."""

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(6)
        mask = torch.func.vmap(torch.func.vmap(lambda i, j: i >= j, (None, 0)), (0, None))(rows, rows)
        return F.cross_entropy(F.linear(mask.float() @ h, w), y)

    right(program, hidden(6, D), weight(), labels(6))


def test_a_head_in_float64_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    h, w = torch.randn(6, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    left(program, h.requires_grad_(), w.requires_grad_(), labels(6), because="is computed in torch.float64")

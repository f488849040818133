"""Products that might be heads have a line in the report, and inner layers have none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.eager_stack import Rewritten

N, D, V = 64, 16, 2048


def operands(tokens: int = N) -> tuple[Tensor, Tensor, Tensor]:
    h, w = torch.randn(tokens, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return h, w, torch.randint(0, V, (tokens,))


def logits(h: Tensor, w: Tensor) -> Tensor:
    return F.linear(h, w)


MADE = {
    "sliced": lambda h, w: h @ w[:2000].T,
    "scaled": lambda h, w: F.linear(h, w * 0.5),
    "cast": lambda h, w: F.linear(h, w.bfloat16().float()),
    "normalised": lambda h, w: F.linear(h, F.normalize(w, dim=-1)),
    "merged": lambda h, w: F.linear(h, w + w[:, :2] @ w[:2]),
    "singular values": lambda h, w: torch.linalg.svdvals(h @ w.T),
    "deviations": lambda h, w: (h @ w.T).std(0),
    "stacked": lambda h, w: torch.stack([h @ w.T, h @ w.exp().T], 1),
    "joined": lambda h, w: torch.cat([h @ w.T, h @ w.exp().T], 1),
    "two returned": lambda h, w: (F.linear(h, w), F.linear(h.sin(), w)),
}


@pytest.mark.parametrize("form", MADE)
def test_every_product_that_could_be_a_head_has_a_line(form: str) -> None:
    rewritten = Rewritten(MADE[form])
    h, w, _ = operands()
    rewritten(h, w)
    heads = 2 if form in ("stacked", "joined", "two returned") else 1
    assert len(rewritten.report.heads) == heads
    assert all(head.fused or head.reason for head in rewritten.report.heads)


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(2048, 64, 800), (1024, 512, 1500)])
def test_a_head_of_few_classes_has_a_line_that_does_not_stop_a_strict_program(
    tokens: int, hidden: int, vocab: int
) -> None:
    rewritten = Rewritten(logits, {"fusedhead.min_logits": "auto", "fusedhead.strict": True})
    rewritten(torch.randn(tokens, hidden), torch.randn(vocab, hidden))
    (head,) = rewritten.report.heads
    assert not head.fused
    assert "may be an inner layer" in head.reason


def test_inner_layers_have_none() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x))))

    body = nn.Sequential(*(Block() for _ in range(3)), nn.LayerNorm(64))
    rewritten = Rewritten(body, {"fusedhead.min_logits": "auto"})
    rewritten(torch.randn(32_768, 64))
    assert rewritten.report.heads == []

"""Whatever a program does with deferred logits, it gets what eager code gets, gradients and errors included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.deferred.heads import B, Model, T, V, deferring, gradients

X = torch.arange(B * T).view(B, T)


def seeded(draw: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same random numbers for both."""

    def use(z: Tensor) -> Tensor:
        torch.manual_seed(3)
        return draw(z)

    return use


def likely_classes(z: Tensor) -> Tensor:
    """Nucleus sampling."""
    ordered, at = torch.sort(z, descending=True, dim=-1)
    unlikely = ordered.softmax(-1).cumsum(-1) > 0.9
    unlikely[..., 1:] = unlikely[..., :-1].clone()
    unlikely[..., 0] = False
    return z.masked_fill(unlikely.scatter(-1, at, unlikely), float("-inf")).softmax(-1)


def columns_set(z: Tensor) -> Tensor:
    z[:, 0] = 0.0
    return z.sum()


def rows_set(z: Tensor) -> Tensor:
    z[X > 3] = 1.0
    return z.logsumexp(-1)


USES: dict[str, Callable[[Tensor], Any]] = {
    "sorted": lambda z: z.sort(-1).values[..., :5].sum(),
    "order": lambda z: z.argsort(-1)[..., 0],
    "nucleus": likely_classes,
    "entries by a mask": lambda z: z[z > 0].sum(),
    "comparisons": lambda z: ((z > 0) & (z < 1)).float().mean(-1),
    "where": lambda z: torch.where(z > 0, z, z * 0.1).logsumexp(-1),
    "the largest of all": lambda z: z.max(),
    "extremes": torch.aminmax,
    "a median": lambda z: z.median(-1),
    "einsum": lambda z: torch.einsum("btv,v->bt", z, torch.ones(V)),
    "another projection": lambda z: z @ torch.ones(V, 2),
    "concatenated": lambda z: torch.cat([z, z], 0).sum(),
    "stacked over nothing": lambda z: torch.stack([z, z * 2]).logsumexp(0).sum(),
    "dropout": seeded(lambda z: F.dropout(z, 0.5).sum()),
    "gumbel": seeded(lambda z: F.gumbel_softmax(z, dim=-1).pow(2).sum()),
    "multinomial": seeded(lambda z: torch.multinomial(z.softmax(-1).view(-1, V), 1)),
    "normalised": lambda z: F.layer_norm(z, (V,)).pow(2).mean(),
    "cosine": lambda z: F.cosine_similarity(z[0], z[1], dim=-1),
    "rolled": lambda z: z.roll(1, 1).logsumexp(-1),
    "repeated": lambda z: z.unsqueeze(0).expand(3, -1, -1, -1).logsumexp(-1),
    "columns set": columns_set,
    "rows set": rows_set,
    "filled in place": lambda z: z.masked_fill_(torch.arange(V) > 900, float("-inf")).logsumexp(-1),
    "float64": lambda z: z.double().logsumexp(-1).sum(),
    "mean over tokens": lambda z: (z - z.mean(0)).pow(2).mean(),
    "tokens subtracted": lambda z: (z[:1] - z[1:]).logsumexp(-1),
    "margin": lambda z: F.multi_margin_loss(z.view(-1, V), X.view(-1)),
    "below the best": lambda z: z.masked_fill(z < z.topk(9).values[..., -1:], float("-inf")).logsumexp(-1),
    "a shape that does not fit": lambda z: z.view(-1, 7),
    "a label too many": lambda z: F.cross_entropy(z.view(-1, V), torch.zeros(B * T + 1, dtype=torch.long)),
    "a dimension too many": lambda z: z.logsumexp(5),
}


@pytest.mark.parametrize("use", USES)
def test_it_gets_what_eager_code_gets(use: str) -> None:
    model = Model()

    def outcome(z: Tensor) -> Any:
        try:
            result = USES[use](z)
        except Exception as error:
            return type(error)
        first = result if isinstance(result, Tensor) else result[0]
        if not first.requires_grad:
            return result
        try:
            return result, gradients(model, torch.nan_to_num(first, neginf=0.0).sum())
        except RuntimeError as error:  # an op without a derivative, as aminmax in torch 2.11
            return result, str(error)

    expected, actual = outcome(model(X)), outcome(deferring(model)(X))
    if isinstance(expected, type):
        assert actual is expected
    elif isinstance(expected, tuple) and isinstance(expected[-1], str):
        torch.testing.assert_close(actual[0], expected[0], rtol=2e-4, atol=1e-5, equal_nan=True)
        assert actual[-1] == expected[-1]
    else:
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-5, equal_nan=True)

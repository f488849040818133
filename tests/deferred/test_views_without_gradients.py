"""Views and copies of returned logits that a compiled model takes without gradients: what they say and what they give.

FUSEDHEAD_VIEWS=1 python -m pytest tests/deferred/test_views_without_gradients.py    # all; else some
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.deferred.heads import Model, V, deferring, tokens

STEP = 1 if os.environ.get("FUSEDHEAD_VIEWS") else 17
ROWS, T = 12, 6
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "last token": lambda z: z[:, -1],
    "flat": lambda z: z.view(-1, V),
    "first": lambda z: z[0],
    "transposed": lambda z: z.transpose(0, 1),
    "chunk": lambda z: z.chunk(2, 1)[1],
    "unbound": lambda z: z.unbind(0)[1],
    "unsqueezed": lambda z: z.unsqueeze(0),
    "itself": lambda z: z,
    "contiguous": lambda z: z.contiguous(),
    "detached": lambda z: z.detach(),
    "data": lambda z: z.data,
    "view of what is detached": lambda z: z.detach()[:, 1:],
    "scaled": lambda z: z / 2,
    "view of what is scaled": lambda z: (z / 2).view(-1, V),
    "view of a copy": lambda z: z.clone()[:, 1:],
    "bfloat16": lambda z: z.bfloat16(),
}
RETURNED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "logits and view": lambda z, v: (z, v),
    "view and logits": lambda z, v: (v, z),
    "view": lambda z, v: (v,),
    "view twice": lambda z, v: (v, v + 0),
    "others and view": lambda z, v: (z * 2, v),
    "loss and view": lambda z, v: (F.cross_entropy(z.flatten(0, 1), torch.zeros(ROWS * T, dtype=torch.int64)), v),
}
INSIDE = {"no_grad": torch.no_grad, "enable_grad": torch.enable_grad, "inference_mode": torch.inference_mode}
AROUND = {"": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
ALL = list(itertools.product(VIEWS, RETURNED, [("no_grad", ""), ("enable_grad", "no_grad"), ("no_grad", "no_grad"),
                                               ("enable_grad", "inference_mode")]))  # fmt: skip


def observed(forward: Callable[[Tensor], Any], x: Tensor, model: nn.Module, around: str) -> list[Any]:
    """What there is to see of the results, of losses of each, and of the gradients of these."""
    model.zero_grad()
    with AROUND[around]():
        results = forward(x)
    seen: list[Any] = [
        str((r.requires_grad, r.grad_fn is None, r.is_leaf, r.shape, r.stride(), r.dtype, r.is_inference()))
        for r in results
    ]
    for result, loss in itertools.product(results, (lambda t: t.float().logsumexp(-1), lambda t: t.float().sin())):
        try:
            value = loss(result).mean()
            seen += [value.requires_grad, value.detach()]
            if value.requires_grad:
                value.backward(retain_graph=True)
                seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
                seen += [result.grad if result.is_leaf else None]
        except RuntimeError as error:
            seen.append(type(error))
    return seen


@pytest.mark.parametrize(("view", "returned", "modes"), ALL[::STEP], ids=lambda value: str(value))
def test_they_are_what_eager_code_makes_of_them(view: str, returned: str, modes: tuple[str, str]) -> None:
    inside, around = modes

    def after(z: Tensor) -> Any:
        with INSIDE[inside]():
            v = VIEWS[view](z)
        return RETURNED[returned](z, v)

    model, x = Model(after), tokens(ROWS, T)
    expected = observed(model, x, model, around)
    actual = observed(deferring(model), x, model, around)
    assert len(actual) == len(expected)
    for got, wanted in zip(actual, expected):
        if isinstance(wanted, Tensor):
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-4)
        else:
            assert got == wanted

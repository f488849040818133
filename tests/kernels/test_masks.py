"""Classes that are set to -inf (the step `dropcol`): values and gradients are those of eager code's masked_fill."""

from __future__ import annotations

import math

import pytest
import torch

from fusedhead.kernels.contract import SAVED_STATS, STATS
from fusedhead.kernels.transform.transform import apply, parse
from tests.lowering.heads import OPS, Operands, none, operands

CHAINS = (
    "dropcol:0",
    "mul:0.2 tanh mul:5.0 dropcol:0",
    "dropcol:0 mul:0.2 tanh mul:5.0",
    "dropcol:0 mulcol:1 mulrow:0 dropcol:0 round:bfloat16",
)
V = 700


def masked(v: int = V) -> Operands:
    """A third of the classes is dropped, and so is every third token's label."""
    o = operands(40, v, 8, u=False)
    o.cols[0] = (torch.arange(v) % 3 == 1).double()
    o.cols[1].abs_()
    o.rows.abs_()
    o.y[:, 0] = o.y[:, 0] // 3 * 3 % v
    o.y[::3] += 1
    return o


def truth(o: Operands, chain: str, c: torch.Tensor, total: torch.Tensor | None = None):
    """(lse, picked, dh, dw) of Σ c (lse - picked) by autograd."""
    h, w = o.h.clone().requires_grad_(), o.w.clone().requires_grad_()
    z = apply(parse(chain).smooth, h @ w.T, o.cols, o.rows)
    lse, picked = z.logsumexp(1), z.gather(1, o.y)
    loss = (c * (lse - picked[:, 0])).sum() if total is None else (c * lse + total * z.sum(1)).sum()
    return lse.detach(), picked.detach(), *torch.autograd.grad(loss, (h, w))


def compare(got, true):
    for a, b in zip(got, true):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("memory", [0, -1])
@pytest.mark.parametrize("chain", CHAINS)
def test_one_sweep_gives_what_autograd_gives_labels_on_dropped_classes_included(chain, memory):
    o, e = masked(), none(torch.empty(0, dtype=torch.float64))
    c = torch.rand(40, dtype=torch.float64)
    got = OPS.head_loss(*o, c, -c[:, None], e, e, chain, "lse,picked", memory, True, True, False, False)
    true = truth(o, chain, c)
    compare((got[0], got[1], got[3], got[4]), true)
    assert not bool(got[4][1::3].any())
    assert bool(true[1][::3].isneginf().all()) == chain.endswith(("dropcol:0", "round:bfloat16"))


@pytest.mark.parametrize("chain", CHAINS)
def test_a_backward_of_its_own_gives_what_autograd_gives(chain):
    o, e = masked(), none(torch.empty(0, dtype=torch.float64))
    c = torch.rand(40, dtype=torch.float64)
    stats = dict(zip(STATS, OPS.head_stats(*o, chain, "lse,picked", 0)))
    upstream, saved = (c, -c[:, None], e, e, e), [stats[name] for name in SAVED_STATS]
    got = OPS.head_stats_backward(*upstream, *o, *saved, chain, 0, True, True, False, False)
    compare((stats["lse"], stats["picked"], *got[:2]), truth(o, chain, c))


def test_a_sum_over_dropped_classes_is_infinite_and_its_gradient_is_not():
    o, e = masked(), none(torch.empty(0, dtype=torch.float64))
    c, g = torch.rand(40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    got = OPS.head_loss(*o, c, 0 * c[:, None], g, e, "dropcol:0", "lse,picked,sum", 0, True, True, False, False)
    assert bool(got[2].isneginf().all())
    compare(got[3:5], truth(o, "dropcol:0", c, g)[2:])


def test_whatever_a_dropped_logit_was_is_forgotten():
    o = masked()
    o.y[:] = 3
    o.w[1::3] = torch.tensor([math.nan, math.inf] * 117)[: len(o.w[1::3]), None].double()
    lse, _, _, _, most, where, *_ = OPS.head_stats(*o, "dropcol:0", "lse,max,argmax", 0)
    z = (o.h @ o.w.T).masked_fill(o.cols[0] != 0, -math.inf)
    compare((lse, most, where), (z.logsumexp(1), *z.max(1)))


@pytest.mark.parametrize("memory", [0, -1])
def test_where_no_class_is_left_the_loss_is_nan_and_nothing_flows_back(memory):
    o, e = masked(), none(torch.empty(0, dtype=torch.float64))
    o.cols[0] = 1
    c = torch.rand(40, dtype=torch.float64)
    got = OPS.head_loss(*o, c, -c[:, None], e, e, "dropcol:0", "lse,picked", memory, True, True, False, False)
    true = truth(o, "dropcol:0", c)
    compare((got[0], got[1], got[3], got[4]), true)
    assert bool(got[0].isneginf().all())
    assert not bool(got[3].any())
    assert not bool(got[4].any())

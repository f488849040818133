"""Logits that share a large number: what is made of their differences errs no more than eager code, over many draws.

A log_softmax takes the row's maximum off before it rounds. Whoever subtracts one float32 from another at the end has
lost what lies below the last digit of both: 1e-3 where the logits are near 1e4.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.eager_stack import Rewritten

N, D, V, DRAWS = 48, 16, 1024, 8
LUCK = 1.05  # of a root mean square over so many draws
HALF_A_UNIT = 2.0**-24  # of float32, relative to what is computed: rounding the truth would err as much
SPELLINGS = {
    "cross_entropy": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "label smoothing": lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.9),
    "weights and smoothing": lambda z, y: F.cross_entropy(
        z, y, torch.linspace(0.5, 2, z.shape[-1], dtype=z.dtype), reduction="none", label_smoothing=0.9
    ),
    "nll": lambda z, y: F.nll_loss(torch.log_softmax(z, -1), y, reduction="none"),
    "log-probability": lambda z, y: torch.log_softmax(z, -1).gather(-1, y[:, None])[:, 0],
    "gather - logsumexp": lambda z, y: z.gather(-1, y[:, None])[:, 0] - z.logsumexp(-1),
    "entropy": lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "mean of log-probabilities": lambda z, y: z.log_softmax(-1).mean(-1),
}
OFFSETS = {torch.float32: (0.0, 1e2, 1e4, 1e6), torch.bfloat16: (0.0, 1e2, 1e4), torch.float16: (0.0, 1e2, 1e4)}


def drawn(seed: int, offset: float, source: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """h, w and a bias whose logits are near ``offset``, all of which lies in the bias or in the product."""
    torch.manual_seed(seed)
    h, w, bias = torch.randn(N, D), torch.randn(V, D) / D**0.5, torch.randn(V)
    if source == "bias":
        bias += offset
    else:
        h[:, 0] = w[:, 0] = offset**0.5
    return [x.to(dtype) for x in (h, w, bias)]


def results(function, tensors, y) -> list[torch.Tensor]:
    """The rows' numbers and the gradients of their mean."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    rows = function(*leaves, y)
    return [rows.detach(), *torch.autograd.grad(rows.mean(), leaves)]


@pytest.mark.parametrize("source", ["bias", "product"])
@pytest.mark.parametrize("dtype", OFFSETS, ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_errors_are_no_larger_than_eager_codes_whatever_all_logits_share(spelling, dtype, source):
    def program(h, w, bias, y):
        z = F.linear(h, w, bias)
        return SPELLINGS[spelling](z if z.dtype == torch.float64 else z.float(), y)

    compiled = Rewritten(program)
    for offset in OFFSETS[dtype]:
        ours, eager, size = torch.zeros(3, 4, dtype=torch.float64)
        for seed in range(DRAWS):
            tensors = drawn(seed, offset, source, dtype)
            y = torch.randint(0, V, (N,))
            truth = results(program, [x.double() for x in tensors], y)
            size += torch.stack([x.square().sum() for x in truth])
            for errors, function in ((ours, compiled), (eager, program)):
                result = results(function, tensors, y)
                errors += torch.stack([(a.double() - b).square().sum() for a, b in zip(result, truth)])
        allowed = LUCK * eager.sqrt() + HALF_A_UNIT * size.sqrt()
        assert bool((ours.sqrt() <= allowed).all()), f"{offset:g}: {ours.sqrt() / eager.sqrt()} of eager's"
    assert all(head.fused for head in compiled.report.heads)
    assert compiled.report.heads

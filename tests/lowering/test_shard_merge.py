"""The merge of statistics over ranks, on parts cut from one head: their numbers, and those of their gradients."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedhead.kernels.contract import STATS
from fusedhead.lowering.shard_merge import Part, merged, own_upstream

N, NAMES = 5, ("lse", "picked", "sum", "entropy", "max", "argmax", "variance")


def statistics(z: Tensor, first: int = 0) -> dict[str, Tensor]:
    """Of logits [N, v], by their definitions; of none, what a rank without columns says."""
    if not z.shape[1]:
        zero = z.new_zeros(len(z))
        return dict.fromkeys(NAMES, zero) | {"lse": zero - torch.inf, "max": zero - torch.inf, "argmax": zero.long()}
    logp = z.log_softmax(1)
    p = logp.exp()
    entropy = -(p * logp).sum(1)
    top, at = z.max(1)
    variance = (p * logp**2).sum(1) - entropy**2
    return {"lse": z.logsumexp(1), "sum": z.sum(1), "entropy": entropy, "max": top, "argmax": at + first,
            "variance": variance}  # fmt: skip


def test_every_statistic_has_a_part_of_a_rank() -> None:
    assert set(STATS) | {"weight"} == {field.name for field in fields(Part)}, "say in `merged` how ranks merge it"


def cut(z: Tensor, sizes: list[int], y: Tensor) -> tuple[Part, list[dict[str, Tensor]]]:
    """What the ranks gathered that hold so many columns each, and each rank's own."""
    own, first = [], 0
    for size in sizes:
        part = z[:, first : first + size]
        result = statistics(part, first)
        here = (y >= first) & (y < first + size)
        cell = torch.where(here, y - first, 0)
        result["picked"] = torch.where(here, part.gather(1, cell) if size else torch.zeros_like(y, dtype=z.dtype), 0)
        result["lse_low"] = z.new_zeros(len(z))
        result["spread"] = torch.where(torch.tensor(size == 0), 0, size * result["lse"] - result["sum"])
        own.append(result)
        first += size
    names = (*NAMES, "lse_low", "spread")
    stacked: dict[str, Any] = {name: torch.stack([result[name] for result in own]) for name in names}
    return Part(weight=z.new_tensor(sizes), **stacked), own


SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any)
DRAWN = {"sizes": SIZES, "seed": st.integers(0, 1 << 20), "scale": st.sampled_from([0.0, 1.0, 30.0, 600.0])}


@settings(max_examples=60, deadline=None)
@given(**DRAWN)
def test_statistics_of_pieces_are_those_of_the_whole(sizes: list[int], seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    z = (torch.randn(N, sum(sizes), dtype=torch.float64) * scale).round(decimals=1)
    y = torch.randint(0, sum(sizes), (N, 1))
    parts, _ = cut(z, sizes, y)
    result, truth = merged(parts), statistics(z)
    truth["picked"], truth["spread"] = z.gather(1, y), sum(sizes) * truth["lse"] - truth["sum"]
    for name, exact in truth.items():
        got = result[name] + (result["lse_low"] if name == "lse" else 0)
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9 * max(1.0, scale) ** 2, msg=name)
    assert torch.equal(result["argmax"], z.argmax(1))


@settings(max_examples=40, deadline=None)
@given(**DRAWN)
def test_gradients_of_a_ranks_own_statistics_give_those_of_all(sizes: list[int], seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    z = torch.randn(N, sum(sizes), dtype=torch.float64) * scale
    z.requires_grad_()
    names, y = ("lse", "entropy", "variance"), torch.zeros((N, 1), dtype=torch.int64)
    upstream = {name: torch.randn(N, dtype=torch.float64) for name in names}
    whole = statistics(z)
    (exact,) = torch.autograd.grad([whole[name] for name in names], z, [upstream[name] for name in names])
    parts, own = cut(z.detach(), sizes, y)
    total = merged(parts)
    first = 0
    for size, of_rank in zip(sizes, own):
        if size:
            given_to: dict[str, Tensor | None] = dict(upstream)
            own_upstream(given_to, total, of_rank)
            part = z.detach()[:, first : first + size].requires_grad_()
            mine = statistics(part)
            (got,) = torch.autograd.grad([mine[n] for n in names], part, [given_to[n] for n in names])
            least = 1e-9 * (1 + exact.abs().max())
            torch.testing.assert_close(got, exact[:, first : first + size], rtol=1e-7, atol=float(least))
        first += size


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_logit_is_seen_on_every_rank(broken: float) -> None:
    z = torch.randn(N, 6, dtype=torch.float64)
    z[1, 4] = broken
    parts, _ = cut(z, [3, 0, 3], torch.zeros((N, 1), dtype=torch.int64))
    result, truth = merged(parts), statistics(z)
    for name in ("lse", "max"):
        torch.testing.assert_close(result[name], truth[name], equal_nan=True)
    assert torch.equal(result["argmax"], truth["argmax"])
    assert result["entropy"].isnan().tolist() == [False, True, False, False, False]


def test_a_tie_is_the_lowest_index_and_a_row_without_a_column_says_so() -> None:
    z = torch.zeros(N, 6, dtype=torch.float64)
    z[2] = -torch.inf
    parts, _ = cut(z, [0, 2, 0, 4], torch.zeros((N, 1), dtype=torch.int64))
    result = merged(parts)
    assert result["argmax"].tolist() == [0] * N
    assert result["lse"][2] == -torch.inf
    assert result["entropy"].isnan().tolist() == [False, False, True, False, False]

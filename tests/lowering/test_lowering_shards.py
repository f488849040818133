"""Ops of a head in shards: on one rank they are the head's own, and their fakes have the shapes of their results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedhead.compat import FakeTensorMode
from fusedhead.kernels.contract import DIFFERENTIABLE_STATS, SAVED_STATS, STATS
from fusedhead.lowering import shards
from tests.lowering.heads import ALL, OPS, leaves, none, operands

N, V, D = 5, 11, 4


def test_on_one_rank_the_statistics_and_gradients_are_the_head_s(group: str) -> None:
    o = leaves(operands(N, V, D))
    whole = leaves(o)
    got = OPS.shard_stats(*o, "", ALL, 0, 0, V, group, "wide", False)
    expected = OPS.head_stats(*whole, "", ALL, 0)
    for name, a, b in zip(STATS, got, expected):
        if name in ALL.split(","):
            torch.testing.assert_close(a, b, msg=name)
    for results, of in ((got, o), (expected, whole)):
        stats = dict(zip(STATS, results))
        (stats["lse"].sum() + stats["picked"].square().sum() + stats["entropy"].sum()).backward()
        assert of.h.grad is not None
    torch.testing.assert_close((o.h.grad, o.w.grad), (whole.h.grad, whole.w.grad))


@pytest.mark.parametrize("stats", [ALL, "lse,picked", "lse,sum,spread"])
def test_the_fakes_have_the_shapes_and_dtypes_of_the_results(stats: str, group: str) -> None:
    o = operands(N, V, D, k=2, dtype=torch.float32)
    real = OPS.shard_stats(*o, "", stats, 0, 0, V, group, "wide", False)
    with FakeTensorMode() as mode:
        fake = OPS.shard_stats(*map(mode.from_tensor, o), "", stats, 0, 0, V, group, "wide", False)
    names = (*STATS, *SAVED_STATS, "token")
    told = {name: (a.shape, a.dtype) for name, a in zip(names, fake)}
    assert told == {name: (a.shape, a.dtype) for name, a in zip(names, real)}


@pytest.mark.parametrize(
    ("dtype", "reduce", "part"),
    [
        (torch.bfloat16, "wide", torch.float32),
        (torch.bfloat16, "own", torch.bfloat16),
        (torch.bfloat16, "", torch.float32),
        (torch.float64, "wide", torch.float64),
    ],
)
def test_a_rank_s_part_of_a_gradient_is_wide_but_where_stock_torch_sums_in_the_own_dtype(
    dtype: torch.dtype, reduce: str, part: torch.dtype
) -> None:
    assert shards.part_dtype(dtype, reduce) == part


def gradients(w: Tensor, group: str, reduce: str) -> tuple[Tensor, ...]:
    o = operands(N, V, D, dtype=torch.bfloat16)
    saved = [o.h.new_zeros(N, dtype=torch.float32) for _ in SAVED_STATS]
    upstream = [o.h.new_ones(N, dtype=torch.float32) if name == "lse" else none(o.h) for name in DIFFERENTIABLE_STATS]
    operands_of_call = o._replace(w=w, u=none(o.h), cols=o.cols[:, : len(w)])
    needs = (True, True, False, False)
    return OPS.shard_stats_backward(*upstream, *operands_of_call, *saved, "", 0, *needs, 0, V, group, reduce)


@pytest.mark.parametrize(("reduce", "dtype"), [("wide", torch.bfloat16), ("", torch.float32)])
def test_a_rank_without_classes_adds_zeros(reduce: str, dtype: torch.dtype, group: str) -> None:
    dh, dw, *_ = gradients(torch.empty(0, D, dtype=torch.bfloat16), group, reduce)
    assert (dh.shape, dh.dtype, dw.shape) == ((N, D), dtype, (0, D))
    assert not dh.any()


def test_the_weight_of_this_rank_s_classes_is_their_sum_or_their_number() -> None:
    o = operands(N, V, D)
    assert shards.class_weight(o.h, o.w, none(o.h)) == V
    assert torch.equal(shards.class_weight(o.h, o.w, o.u), o.u.sum())


def test_the_span_of_one_rank_is_all_that_it_holds(group: str) -> None:
    assert OPS.shard_span(torch.empty(N, D), V, 0, group).tolist() == [0, V]


def test_a_whole_vocabulary_has_a_shape_and_is_never_run() -> None:
    with FakeTensorMode():
        assert OPS.whole_vocab(torch.empty(3, D), 0, V, "", False, False).shape == (V, D)
    with pytest.raises(AssertionError, match="never run"):
        OPS.whole_vocab(torch.empty(3, D), 0, V, "", False, False)

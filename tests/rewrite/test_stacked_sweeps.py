"""Statistics of stacked heads: rows are numbered in the program's order, and come back in it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.analysis.stacked_heads import reading_with_stacks
from fusedhead.graph.nodes import fake
from fusedhead.kernels.contract import STATS
from fusedhead.rewrite.stacked_sweeps import numbers_of_rows, product_of_sizes, stacked_statistics
from fusedhead.rewrite.sweeps import SweepGroup
from tests.analysis.bodies import body_of
from tests.programs.claims import D, V, hidden, weight
from tests.rewrite.sites import computed, emitting

N, K = 5, 3


def in_order(h: Tensor, *w: Tensor) -> Tensor:
    return torch.stack([F.linear(h, x) for x in w], 1).logsumexp(-1)


def turned(h: Tensor, *w: Tensor) -> Tensor:
    return torch.stack([F.linear(h, x) for x in w], 1).transpose(0, 1)[1:].logsumexp(-1)


@pytest.mark.parametrize(("program", "rows"), [(in_order, N * K), (turned, (K - 1) * N)])
def test_each_head_is_swept_once_and_its_rows_are_the_program_s(program, rows: int) -> None:
    inputs = hidden(N, D), *(weight() for _ in range(K))
    body = body_of(program, *inputs)
    reading = reading_with_stacks(body, body.starts)
    assert reading is not None
    (site,) = [site for site in reading.sites if site.terminals]
    group = SweepGroup(list(site.terminals))
    with emitting(body.graph) as emit:
        sizes, place = numbers_of_rows(emit, group.logits)
        statistics, calls = stacked_statistics(emit, group, 0)
    assert sizes == [N, K]
    assert (place is None) == (program is in_order)
    assert len(calls) == K
    assert fake(statistics["lse"]).shape == (rows,)
    (lse,) = computed(body.graph, [statistics["lse"]], *inputs)
    torch.testing.assert_close(lse, program(*inputs).reshape(-1))
    assert group.want == ["lse"]
    assert group.want[0] in STATS


@pytest.mark.parametrize("sizes", [[], [4], [4, 3], [2, 3, 5]])
def test_a_product_of_numbers_needs_no_node(sizes: list[int]) -> None:
    body = body_of(lambda h, w: F.linear(h, w).logsumexp(-1), hidden(N, D), weight(V, D))
    nodes = len(body.graph.nodes)
    with emitting(body.graph) as emit:
        assert product_of_sizes(emit, list(sizes)) == len(list(product(*map(range, sizes))))
    assert len(body.graph.nodes) == nodes

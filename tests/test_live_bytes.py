"""The peak of tensors of logits that are alive together: views and writes in place add nothing, frees are seen."""

from __future__ import annotations

import pytest
import torch

from fusedhead.live_bytes import LiveBytes, LiveSize

N, D, V = 32, 8, 100
SIZE = LiveSize(N, D, V)
ONE = N * V * 4  # bytes of logits in float32


def watching() -> LiveBytes:
    live = LiveBytes()
    live.watch(SIZE)
    return live


def test_tensors_that_are_alive_together_count_together() -> None:
    with watching() as live:
        first = torch.ones(N, V)
        second = first + 1
        del first
        third = second * 2
    assert live.peak_of(SIZE) == 2 * ONE
    del second, third


def test_one_after_another_counts_one() -> None:
    with watching() as live:
        for _ in range(3):
            torch.ones(N, V)
    assert live.peak_of(SIZE) == ONE


def test_a_view_and_a_write_in_place_are_no_tensors_of_their_own() -> None:
    with watching() as live:
        logits = torch.ones(N, V)
        logits.view(4, 8, V).add_(1).transpose(0, 1)
    assert live.peak_of(SIZE) == ONE


SHAPES = [((N, V), True), ((4, 8, V), True), ((4, 7, V), True), ((V, D), False), ((D, V), False), ((N, D), False),
          ((2 * N, V), False), ((N // 2, V), False)]  # fmt: skip


@pytest.mark.parametrize(("shape", "counts"), SHAPES)
def test_logits_are_told_by_their_size_in_any_shape_and_a_weight_is_none(shape: tuple[int, ...], counts: bool) -> None:
    assert SIZE.fits(torch.empty(shape)) is counts


def test_a_size_that_nobody_watches_has_no_peak() -> None:
    assert LiveBytes().peak_of(SIZE) == 0

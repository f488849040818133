"""The table of tiles: every device finds a tile, and the kernels over one window agree on their token blocks."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

from fusedhead.kernels.triton_engine.launch.tiles import (
    AMD,
    PAIRED_FROM,
    READY_TILE,
    TABLE,
    device_of,
    tile_for,
)

KERNELS = ("stream", "exp", "dlogits")
CHIPS = (0, AMD, 7, 8, 9, 10, 12)
TOKENS, HIDDEN = (1, 64, PAIRED_FROM, 1024, 8192), (64, 768, 896, 1024, 1536, 2048, 2560, 3072, 4096, 8192)


@pytest.mark.parametrize("major", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tma", [True, False])
def test_kernels_over_one_window_have_token_blocks_of_one_height(major: int, itemsize: int, tma: bool) -> None:
    for tokens, hidden, pairs in itertools.product(TOKENS, HIDDEN, (False, True)):
        pairs = pairs and major == 9 and itemsize == 2 and tma and tokens >= PAIRED_FROM
        results = {tile_for(kernel, tokens, hidden, itemsize, major, tma, False, pairs).BM for kernel in KERNELS}
        assert len(results) == 1, (tokens, hidden, pairs)


@pytest.mark.parametrize("major", CHIPS)
def test_pairs_are_taken_only_where_they_may_run(major: int) -> None:
    for kernel, tokens, hidden in itertools.product(KERNELS, TOKENS, HIDDEN):
        assert not tile_for(kernel, tokens, hidden, 2, major, True, False).paired
    assert tile_for("stream", 8192, 4096, 2, 9, True, False, pairs=True).paired


def test_sizes_of_tiles_are_powers_of_two_and_parts_divide_them() -> None:
    for row in TABLE:
        for size in (row.tile.BM, row.tile.BN, row.tile.BK, row.tile.parts):
            assert size & (size - 1) == 0
        assert row.tile.BN % row.tile.parts == 0


def test_logits_that_were_computed_are_read_in_a_tile_of_their_own() -> None:
    assert tile_for("stream", 100, 100, 4, 9, True, True) is READY_TILE
    assert tile_for("stream", 100, 100, 4, 0, True, True) is not READY_TILE  # the interpreter has one tile for all


def test_the_interpreter_counts_as_a_chip_of_few_multiprocessors() -> None:
    assert device_of(torch.device("cpu"))[0] == 0

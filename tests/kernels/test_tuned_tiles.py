"""Tiles that were tuned on a machine are used there, and nothing that is wrong with them stops a program."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

from fusedhead.kernels.triton_engine.launch.tiles import Tile
from fusedhead.kernels.triton_engine.launch.tuned_tiles import Tuned, keep_tiles
from tests.kernels.tuned_chip import GPU, chip, tile  # noqa: F401  a fixture for every test

SMALL, LARGE = Tile(128, 128, 32, 8, 8, 3, False, 2), Tile(128, 256, 64, 22, 8, 3, True, 4)
PAIR = Tile(128, 192, 64, 11, 4, 4, False, 3, 2, True)


def test_a_tile_serves_hidden_sizes_up_to_its_own_and_the_largest_all_beyond():
    keep_tiles("chip 0", [Tuned("exp", 2, True, 1024, SMALL), Tuned("exp", 2, True, 4096, LARGE)])
    assert [tile(hidden=d) for d in (64, 1024, 1025, 4096, 9000)] == [SMALL, SMALL, LARGE, LARGE, LARGE]


def test_pairs_go_to_plain_logits_and_the_best_of_the_others_to_the_rest():
    keep_tiles("chip 0", [Tuned("exp", 2, True, 1024, PAIR), Tuned("exp", 2, True, 1024, LARGE)])
    assert tile() == PAIR
    assert tile(pairs=False) == LARGE


def test_the_table_decides_for_whatever_was_not_tuned():
    keep_tiles("chip 0", [Tuned("exp", 2, True, 1024, SMALL)])
    assert tile() == SMALL
    others = ({"kernel": "stream"}, {"device": torch.device("cuda", 1)}, {"itemsize": 4}, {"tma": False}, {"tokens": 8})
    assert all(tile(**other) is None for other in others)
    assert tile(device=torch.device("cpu")) is None


def test_devices_keep_their_tiles_beside_each_other():
    keep_tiles("chip 0", [Tuned("exp", 2, True, 1024, SMALL)])
    keep_tiles("chip 1", [Tuned("exp", 2, True, 1024, LARGE)])
    keep_tiles("chip 0", [Tuned("exp", 2, True, 1024, PAIR)])
    assert tile() == PAIR
    assert tile(device=torch.device("cuda", 1)) == LARGE


@pytest.mark.parametrize("text", ["{", "[]", '{"chip 0": [["exp", 2]]}'])
def test_a_damaged_file_is_logged_and_leaves_it_to_the_table(text, caplog):
    path = keep_tiles("chip 0", [Tuned("exp", 2, True, 1024, SMALL)])
    path.write_text(text)
    with caplog.at_level("WARNING", "fusedhead"):
        assert tile() is None
    assert "cannot be used" in caplog.text


def test_a_tile_of_other_token_blocks_is_not_taken():
    keep_tiles("chip 0", [Tuned("exp", 2, True, 1024, SMALL._replace(BM=64))])
    assert tile() is None

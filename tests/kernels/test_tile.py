"""Tile functions of kernels of two warpgroups, run on the CPU: column parts, labels inside a part, and its store."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
gluon = pytest.importorskip("triton.experimental.gluon", reason="pairs are written in Gluon")

from gluon_on_cpu import flat, local, on_cpu  # noqa: E402

from fusedhead.kernels.triton_engine.gluon import ring, tile  # noqa: E402

BM, BN, NARROW = 8, 192, 64


def test_a_wide_accumulator_is_two_parts_of_neighbouring_columns() -> None:
    acc = torch.arange(BM * 128).view(BM, 128)
    with on_cpu(ring, tile):
        left, right = tile.narrow_parts(acc, BM)
    assert torch.equal(torch.cat((left, right), 1), acc)


def test_rows_and_columns_count_from_their_block_and_part() -> None:
    with on_cpu(ring, tile):
        assert tile.token_rows(3, BM).tolist() == list(range(3 * BM, 4 * BM))
        assert tile.columns_of(2 * NARROW, None, NARROW).tolist() == list(range(128, 192))
        (sums,) = tile.zero_sums(BM)
    assert torch.equal(sums, torch.zeros(BM))


@pytest.mark.parametrize("first", [0, 64, 128])
def test_only_labels_inside_a_part_are_stored(first: int) -> None:
    z = torch.randn(BM, NARROW)
    columns = torch.tensor([0, 63, 64, 127, 128, 191, -1, 500], dtype=torch.int32)  # in the tile, and outside of it
    out = torch.full((2 * BM, 1), float("nan"))
    place = SimpleNamespace(label_columns=columns, block=1, tile=0)
    with on_cpu(ring, tile):
        tile.store_labelled_part(z, None, place, 2 * BM, flat(out), 1, first, None, BM, BN, NARROW)
    inside = (columns >= first) & (columns < first + NARROW)
    expected = z.gather(1, (columns - first).clamp(0, NARROW - 1).long()[:, None])
    assert torch.equal(out[BM:][inside], expected[inside])
    assert out[:BM].isnan().all()
    assert out[BM:][~inside].isnan().all()


class Target:
    """What stands for a tensor descriptor: it keeps the parts that are stored to it."""

    dtype, layout = torch.bfloat16, None


def test_parts_take_turns_with_two_halves_of_the_staging() -> None:
    to, place = Target(), SimpleNamespace(block=2, tile=1, step=0)
    values = [torch.full((BM, NARROW), float(j)) for j in range(3)]
    local.stores = []
    with on_cpu(ring, tile):
        stage = tile.staging(to, BM)
        stored = []
        for j, part in enumerate(values):
            local.stores = local.stores[-1:]  # the wait before a store leaves one in flight
            tile.store_part(part, to, stage, place, j, BM, BN)
            stored.append(local.stores[-1])
    assert [corner for _, corner, _ in stored] == [[2 * BM, BN + j * NARROW] for j in range(3)]
    assert stored[0][2].data.data_ptr() == stored[2][2].data.data_ptr() != stored[1][2].data.data_ptr()
    assert torch.equal(stored[2][2].data, values[2].to(torch.bfloat16))
    local.stores = []

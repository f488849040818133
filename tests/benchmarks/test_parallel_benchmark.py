"""`benchmarks.parallel` on a CPU: that its harness sends, counts and compares what it says. No time is claimed here."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import arrangements, cost_model, parallel, parallel_report, ranks
from benchmarks.parallel_heads import CONTENDERS, ONE
from benchmarks.parallel_report import Row
from benchmarks.shapes import parse
from tests.benchmarks.parallel_ranks import SMOKE
from tests.functional.ranks import on_ranks

CPU = torch.device("cpu")
(CASE,) = parse(parallel.SMOKE)
MARKS = 12  # bytes that a rank says of itself, beside its statistics
FUNCTION = [name for name, contender in CONTENDERS.items() if not contender.compiled]


@cache
def launched() -> list[dict[str, Any]]:
    """One smoke run on two gloo processes."""
    return on_ranks("tests.benchmarks.parallel_ranks:smoke", 2)


def rows() -> dict[str, Row]:
    return {row["contender"]: Row(**row) for row in launched()[0]["rows"]}


def test_every_contender_of_a_launched_run_has_a_time_of_both_ranks() -> None:
    first, second = ({row["contender"]: row for row in each["rows"]} for each in launched())
    assert list(first) == FUNCTION
    for name, row in first.items():
        assert row["note"] == ""
        assert row["ms"] > 0
        assert row["ms"] == second[name]["ms"]  # the slowest rank's, on both
        assert (row["ranks"], row["wire"]) == (2, "gloo")


@pytest.mark.parametrize("name", [name for name in FUNCTION if CONTENDERS[name].arrangement])
def test_what_is_timed_is_right(name: str) -> None:
    error = rows()[name].error
    assert set(error) == {"loss", "dh", "dw"}
    assert all(value < 1e-6 for value in error.values()), error


@pytest.mark.parametrize("name", ["group=", "group=, vocab_size", "group=, dH in its dtype"])
def test_the_cost_model_s_collectives_are_those_that_the_function_calls(name: str) -> None:
    modelled = arrangements.ARRANGEMENTS[name].collectives(CASE, 2)
    called = [(kind, nbytes) for kind, nbytes in rows()[name].collectives]
    assert [(kind, nbytes - 2 * MARKS * (at == 1)) for at, (kind, nbytes) in enumerate(called)] == [
        (one.kind, one.nbytes) for one in modelled
    ]


@pytest.mark.parametrize("sequence", [False, True])
def test_the_cost_model_s_collectives_of_loss_parallel_are_torch_s(sequence: bool) -> None:
    name = "loss_parallel, sequence parallel" if sequence else "loss_parallel"
    modelled = arrangements.ARRANGEMENTS[name].collectives(CASE, 2)
    for rank in launched():
        called = rank["loss_parallel"][sequence]
        assert [ranks.KINDS[kind] for kind, _ in called] == [one.kind for one in modelled]
        for (kind, shape), one in zip(called, modelled):
            handed_in = one.nbytes / (2 if kind.startswith("all_gather") else 1)
            assert math.prod(shape) * CASE.torch_dtype.itemsize == handed_in


def test_a_shard_is_timed_with_and_without_its_wire_and_the_wire_alone() -> None:
    row = rows()["group="]
    assert row.unsent_ms
    assert row.alone_ms
    assert row.ms is not None
    assert row.exposed_ms == pytest.approx(row.ms - row.unsent_ms)
    assert row.model_wire_ms
    assert row.from_shard_ms == pytest.approx(row.unsent_ms + row.model_wire_ms)
    assert rows()[ONE].efficiency == 1.0


def test_a_launched_run_writes_its_link_rows_and_table_on_rank_0_alone() -> None:
    first, second = launched()
    assert not second["files"]
    assert set(first["files"]) == {"parallel.json", "parallel.md"}
    results = json.loads(first["files"]["parallel.json"])
    assert {"command", "date", "device", "versions"} <= set(results["runs"][0])
    assert results["link"]["latency"] > 0
    assert results["link"]["ranks"] == 2
    for kind in cost_model.SCHEDULES:
        assert [each["bytes"] for each in results["collectives"][kind]] == list(ranks.SIZES[:3])
    assert "### Collectives alone" in first["files"]["parallel.md"]
    assert [Row(**row) for row in results["rows"]] == [Row(**row) for row in first["rows"]]


def test_one_process_stands_for_a_rank_of_so_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = parallel.main([*SMOKE, "--ranks", "1,4", "--out", str(tmp_path)])
    assert [(row.ranks, row.contender) for row in result] == [
        (count, name) for count in (1, 4) for name in FUNCTION if CONTENDERS[name].unsent
    ]
    assert not [row.note for row in result if row.note]
    assert all(row.wire == "" and row.ms for row in result)
    assert not dist.is_initialized()
    shown = capsys.readouterr().out
    assert "4 shards (no wire: one rank's shard, collectives are copies)" in shown
    assert "error" not in shown


def test_runs_are_merged_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(launched()[0]["files"]["parallel.json"])
    results = json.loads((tmp_path / "a.json").read_text())
    results["rows"] = [{**row, "ms": 1.0, "wire": wire} for row in results["rows"][:1] for wire in ("gloo", "")]
    (tmp_path / "b.json").write_text(json.dumps(results))
    words = ["report", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    parallel_report.main()
    merged = json.loads((tmp_path / "parallel.json").read_text())
    assert len(merged["runs"]) == 2
    assert len(merged["rows"]) == len(FUNCTION) + 1
    assert merged["rows"][0]["ms"] == 1.0


def test_copies_stand_for_collectives_and_are_taken_away_again() -> None:
    real, x = dist.all_reduce, torch.ones(4)
    whole, part = torch.zeros(4), torch.tensor([1.0, 2.0])

    def step() -> tuple[torch.Tensor, ...]:
        dist.all_reduce(x).wait()  # type: ignore[union-attr]
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, torch.arange(4.0))
        return x, whole.clone(), part

    summed, gathered, scattered = ranks.without_wire(step)()
    assert dist.all_reduce is real
    assert summed.tolist() == [1, 1, 1, 1]
    assert gathered.tolist() == [1, 2, 1, 2]
    assert scattered.tolist() == [0, 1]
    alone, inputs = torch.full((2,), 7.0), torch.tensor([3.0, 4.0])  # of a group of one
    ranks.without_wire(lambda: (dist.all_gather_into_tensor(alone, inputs), ())[1])()
    assert alone.tolist() == inputs.tolist() == [3, 4]


def test_a_contender_that_fails_is_a_row_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(shard: Any) -> Any:
        raise ValueError("no such head")

    monkeypatch.setitem(CONTENDERS, "wrong", CONTENDERS[ONE]._replace(make=wrong))
    words = [*SMOKE, "--ranks", "2", "--contenders", f"wrong;{ONE}", "--out", str(tmp_path)]
    first, second = parallel.main(words)
    assert (first.note, first.ms) == ("ValueError: no such head", None)
    assert second.ms


def test_a_gather_of_one_rank_is_a_copy_of_what_goes_in() -> None:
    out, x = torch.zeros(2), torch.tensor([1.0, 2.0])
    ranks.without_wire(lambda: dist.all_gather_into_tensor(out, x))()
    assert out.tolist() == x.tolist() == [1, 2]

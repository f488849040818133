"""The benchmark's harness: tiny runs on the CPU; the numbers themselves are nobody's claim here."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks import contenders, data, errors, head, measure, report, shapes, tasks

TINY = shapes.Case(48, 16, 96, "float32")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[report.Row]]:
    """One run of two contenders that work and one that does not."""
    folder = tmp_path_factory.mktemp("benchmark")
    gc.freeze()  # the harness collects garbage before each contender: not what the tests before it left
    contenders.CONTENDERS["absent"] = contenders.Contender("absent", absent, (), "never there")
    words = ["--device", "cpu", "--shapes", TINY.text, "--contenders", "eager,floor twice,absent"]
    contenders.CONTENDERS["floor twice"] = contenders.Contender("floor twice", contenders.eager, (), "again")
    try:
        rows = head.main([*words, "--rounds", "3", "--seconds", "0.1", "--data", "trained", "--out", str(folder)])
    finally:
        del contenders.CONTENDERS["absent"], contenders.CONTENDERS["floor twice"]
    return folder, rows


def absent(task: tasks.Task) -> tasks.Program:
    raise contenders.Unavailable("no such package")


def test_a_run_writes_json_and_a_table(run: tuple[Path, list[report.Row]]) -> None:
    folder, rows = run
    results = json.loads((folder / "head.json").read_text())
    assert {"command", "date", "device", "versions"} <= set(results["runs"][0])
    assert len(results["rows"]) == len(rows) == 4 * 4  # four tasks; the floor and three contenders
    assert "floor/ms" in (folder / "head.md").read_text()
    _, loaded = report.load(folder / "head.json")
    assert loaded == rows
    assert report.merged(rows + loaded) == loaded


def test_a_contender_that_works_has_every_number(run: tuple[Path, list[report.Row]]) -> None:
    train = {row.contender: row for row in run[1] if row.task == "train"}
    eager = train["eager"]
    assert eager.ms is not None
    assert eager.ms > 0
    assert eager.rounds == 3
    assert eager.ratio == pytest.approx(train[report.FLOOR].ms / eager.ms)
    assert set(eager.error) == {"loss", "dh", "dw"}
    assert all(ratio == 1.0 for ratio in eager.over_eager.values())
    assert eager.extra_mib is not None
    assert eager.extra_mib >= TINY.logits_bytes() / 2**20
    assert "eager" in report.table(list(train.values()))


def test_a_contender_that_fails_is_a_row_with_its_reason(run: tuple[Path, list[report.Row]]) -> None:
    rows = [row for row in run[1] if row.contender == "absent"]
    assert [row.task for row in rows] == list(tasks.TASKS)
    assert all(row.note == "no such package" and row.ms is None for row in rows)


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)
@pytest.mark.parametrize("kind", data.SETS)
def test_the_windowed_truth_is_the_gradient_of_the_program_in_float64(task: tasks.Task, kind: str) -> None:
    batch = data.SETS[kind](TINY._replace(dtype="float64"), CPU)
    truth = errors.truth_of(task, batch)
    results = tasks.step_of(task, lambda h, w, y: in_float64(task, h, w, y), batch)()
    assert_close(results[0], truth.value, check_dtype=False)
    assert all(error < 1e-12 for error in errors.errors_of(task, results, truth).values())


def in_float64(task: tasks.Task, h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = h @ w.t()
    if task.per_token:
        return z.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    return torch.nn.functional.cross_entropy(z, y)


def test_a_result_with_a_nan_is_never_near_the_truth() -> None:
    truth = torch.ones(4, 3)
    assert math.isnan(errors.relative(torch.tensor([1.0, float("nan"), 1.0]).expand(4, 3), truth))


def test_the_trained_set_is_confident_zipf_like_and_ignores_every_17th_label() -> None:
    case = shapes.Case(680, 256, 2048, "float32")
    batch = data.trained(case, CPU)
    assert (batch.y == data.IGNORED).nonzero().flatten().tolist() == list(range(0, 680, 17))
    kept = batch.y[batch.y != data.IGNORED]
    assert (kept < 256).float().mean() > 0.5  # an eighth of the vocabulary, more than half of the labels
    probabilities = (batch.h @ batch.w.t()).softmax(-1)
    top = probabilities.topk(5).values.sum(-1)
    assert 0.5 < top.mean() < 0.999


def test_the_memory_of_a_step_is_its_peak_less_what_it_returns() -> None:
    def step() -> tuple[torch.Tensor]:
        scratch = torch.ones(1 << 20)
        return (scratch[: 1 << 10].clone(),)

    assert measure.extra_bytes(step, CPU) == 4 << 20


def test_rounds_are_interleaved_and_a_late_failure_keeps_the_numbers_so_far() -> None:
    calls: list[str] = []

    def steady() -> tuple[()]:
        calls.append("steady")
        return ()

    def failing() -> tuple[()]:
        calls.append("failing")
        if calls.count("failing") > 60:
            raise RuntimeError("out of memory")
        return ()

    times = measure.interleaved({"steady": steady, "failing": failing}, CPU, rounds=3, seconds=1.0)
    assert len(times["steady"]) == 3
    assert len(times["failing"]) == 1
    assert calls.index("failing") < len(calls) - 1 - calls[::-1].index("steady")


def test_every_round_has_an_order_of_its_own() -> None:
    turns: list[str] = []
    steps = {name: (lambda: ()) for name in "abcde"}
    measure.interleaved(steps, CPU, rounds=6, seconds=10.0, seen=turns.append)
    rounds = ["".join(turns[at : at + 5]) for at in range(0, len(turns), 5)]
    assert rounds[0] == "abcde"
    assert {"".join(sorted(each)) for each in rounds} == {"abcde"}
    assert len(set(rounds)) >= 4


def test_shapes_are_read_or_refused_by_name() -> None:
    assert shapes.parse("8x4x16,512x4096x128256:float32") == [
        shapes.Case(8, 4, 16, "bfloat16"),
        shapes.Case(512, 4096, 128256, "float32"),
    ]
    assert shapes.parse("cuda") == list(shapes.FAMILIES["cuda"])
    with pytest.raises(ValueError, match="'8x4'"):
        shapes.parse("8x4")
    with pytest.raises(ValueError, match="float33"):
        shapes.parse("8x4x2:float33")

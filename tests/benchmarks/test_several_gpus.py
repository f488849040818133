"""The run on several GPUs, without one: what it starts exists, and a command that hangs is ended with its processes."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest

from benchmarks import distributed_steps, killed_rank, several_gpus
from benchmarks.several_gpus import Command
from tests.functional.ranks import on_ranks

ROOT = Path(__file__).parents[2]


def every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[Command]:
    """The commands that would run, in order."""
    seen: list[Command] = []
    monkeypatch.setattr(several_gpus, "run", lambda group, out, deadline: seen.extend(group) or [])
    several_gpus.main(["--out", str(tmp_path), *words])
    return seen


def test_every_command_is_a_module_that_takes_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = every_command(tmp_path, monkeypatch)
    names = ["matrix", "killed", "heads_0", "heads_1", "gpt", "alone_0", "alone_1", "qwen3"]
    assert [command.name for command in result] == names
    for command in result:
        words = command.words[command.words.index("-m", 1 if "torch.distributed.run" in command.words else 0) :]
        if words[1] == "tests.parallel.device":
            continue
        text = (ROOT / (words[1].replace(".", "/") + ".py")).read_text(encoding="utf-8")
        strings = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
        assert {word for word in words if word.startswith("--")} <= strings, command.name


def test_limits_of_all_parts_fit_in_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = several_gpus.argparse.Namespace(
        out=tmp_path, ranks=2, shapes=several_gpus.SHAPES, parts=["matrix", "killed", "heads", "gpt", "alone"]
    )
    assert sum(max(command.limit for command in group) for group in several_gpus.groups(inputs)) <= 580


def test_parts_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = every_command(tmp_path, monkeypatch, "--parts", "heads", "--shapes", "64x32x512", "--ranks", "4")
    (only,) = result
    assert only.words[only.words.index("--nproc-per-node") + 1] == "4"
    assert "64x32x512" in only.words
    with pytest.raises(SystemExit):
        several_gpus.main(["--parts", "pipelines"])
    assert "no part is called 'pipelines'" in capsys.readouterr().err


def runs(process: Path) -> bool:
    """Whether a process of /proc is there, and no mere entry that nobody has asked about."""
    try:
        return (process / "stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_command_that_hangs_is_ended_with_what_it_has_started_and_the_next_one_runs(tmp_path: Path) -> None:
    hangs = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'],"
    hangs += " start_new_session=True); print(p.pid, flush=True); time.sleep(99)"
    group = [Command("hangs", ["-c", hangs], 2.0), Command("ends", ["-c", "print('done')"], 60.0)]
    began = time.monotonic()
    lines = several_gpus.run(group, tmp_path, time.monotonic() + 60)
    assert time.monotonic() - began < 50
    assert lines[0].startswith("hangs: stopped at its limit of 2 s")
    assert lines[1].startswith("ends: exit status 0")
    assert (tmp_path / "ends.log").read_text() == "done\n"
    process = Path("/proc", (tmp_path / "hangs.log").read_text().strip())
    until = time.monotonic() + 20  # a killed process ends when it is next given the processor
    while (alive := runs(process)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive
    assert several_gpus.run(group, tmp_path, time.monotonic() + 5)[0].startswith("hangs: not run")


def test_training_steps_on_two_processes_give_one_table() -> None:
    first, second = on_ranks("tests.benchmarks.parallel_ranks:training_steps", 2, timeout=300)
    assert second["said"] == ""
    name = "FSDP2, one unit, loss inside"
    arm, other = first[name]["eager"], second[name]["eager"]
    assert "note" not in arm, arm["note"]
    assert len(arm["losses"]) == 3
    assert (arm["losses"], arm["ms"]) == (other["losses"], other["ms"])  # those of all ranks
    assert f"| {name} | " in first["said"]


def test_a_table_says_what_did_not_run() -> None:
    arm = {"ms": 100.0, "peak_bytes": 3 << 30, "losses": [5.0, 4.0]}
    text = distributed_steps.table({"DDP": {"inductor": arm}}, ["inductor", "fusedhead"], 2048)
    assert text.splitlines()[-1] == "| DDP | 100.0, 3.00, 20,480 | not run: no time left |  |"


@pytest.mark.parametrize(
    ("hung", "status", "steps", "well"), [(False, 1, 3, True), (True, -9, 3, False), (False, 0, 9, False)]
)
def test_a_rank_that_is_left_must_end_by_itself_with_an_error(hung: bool, status: int, steps: int, well: bool) -> None:
    assert killed_rank.ended_well({"hung": hung, "exits": [status, -9], "steps": steps}) is well

"""fusedhead run: an unchanged program trains on fused heads, and stderr says so at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fusedhead.run.cli import main
from tests.run.forks import Ours
from tests.run.programs import COMPILED, EAGER, MODEL, write


def losses(text: str) -> list[float]:
    return [float(line) for line in text.split()]


@pytest.fixture(scope="module")
def by_hand(ours: Ours, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What the eager program prints."""
    folder = tmp_path_factory.mktemp("eager")
    write(folder, EAGER)
    return losses(ours("--quiet", "program.py", cwd=folder).out)


def test_a_compiled_program_is_fused_and_learns_what_it_learned(
    tmp_path: Path, ours: Ours, by_hand: list[float]
) -> None:
    write(tmp_path, COMPILED)
    run = ours("program.py", cwd=tmp_path)
    assert run.code == 0, run.err
    assert losses(run.out) == pytest.approx(by_hand, abs=2e-4)
    first, *rest = run.err.splitlines()
    assert first.startswith("fusedhead: 1 head fused, 0 left, in 1 graph")
    assert "cross_entropy(mean, ignore_index=-100)" in rest[-1]
    assert "program.py:15" in rest[-1]


def test_a_program_that_compiles_nothing_is_told_so(tmp_path: Path, ours: Ours) -> None:
    write(tmp_path, EAGER)
    assert "nothing was compiled" in ours("program.py", cwd=tmp_path).err


def test_compile_eager_fuses_a_program_that_compiles_nothing(tmp_path: Path, ours: Ours, by_hand: list[float]) -> None:
    write(tmp_path, EAGER)
    run = ours("--compile-eager", "program.py", cwd=tmp_path)
    assert run.code == 0, run.err
    assert losses(run.out) == pytest.approx(by_hand, abs=2e-4)
    assert run.err.startswith("fusedhead: 1 head fused, 0 left, in 1 graph")


BROKEN = """
import torch._inductor.compile_fx

def broken(*args, **kwargs):
    raise RuntimeError("no compiler here")

torch._inductor.compile_fx.compile_fx = broken
"""


def test_a_graph_that_failed_to_compile_is_said_to_have_run_eagerly(
    tmp_path: Path, ours: Ours, by_hand: list[float]
) -> None:
    write(tmp_path, BROKEN + EAGER)
    run = ours("--compile-eager", "program.py", cwd=tmp_path)
    assert run.code == 0, run.err
    assert losses(run.out) == pytest.approx(by_hand, abs=2e-4)
    assert "0 heads fused, 1 left" in run.err
    assert "RuntimeError: no compiler here" in run.err
    assert "ran eagerly" in run.err


DEFERRED = MODEL.replace("return F.cross_entropy(logits.flatten(0, 1), labels.flatten())", "return logits")
BUILT = (
    DEFERRED
    + """
if __name__ == "__main__":
    model = torch.compile(Model(vocab=2048))
    tokens = torch.randint(0, 512, (2, 16))
    logits = model(tokens, tokens)
    logits[:, :, 3] += -1e6
    print(logits.svd()[1].shape)
"""
)


def test_logits_that_were_built_are_said_to_be_with_the_line_that_built_them(tmp_path: Path, ours: Ours) -> None:
    path = write(tmp_path, BUILT)
    line = path.read_text().splitlines().index("    print(logits.svd()[1].shape)") + 1
    run = ours("--report", "out.html", "program.py", cwd=tmp_path)
    assert run.code == 0, run.err
    assert "built once of 1" in run.err
    assert f"at program.py:{line}" in run.err
    assert "(head)" in run.err
    assert f"at program.py:{line}" in (tmp_path / "out.html").read_text()


def test_a_failing_program_keeps_its_exit_code_and_still_gets_its_summary(tmp_path: Path, ours: Ours) -> None:
    write(tmp_path, COMPILED + "    sys.exit(5)\n")
    run = ours("program.py", cwd=tmp_path)
    assert run.code == 5
    assert "1 head fused" in run.err


def test_strict_stops_at_a_head_that_is_not_fused(tmp_path: Path, ours: Ours) -> None:
    text = COMPILED.replace("return F.cross_entropy", "return logits.std() + F.cross_entropy")
    write(tmp_path, text)
    relaxed = ours("program.py", cwd=tmp_path)
    assert relaxed.code == 0
    assert "0 heads fused, 1 left" in relaxed.err
    assert "because aten.std.correction runs over tokens" in relaxed.err
    strict = ours("--strict", "program.py", cwd=tmp_path)
    assert strict.code == 1
    assert "FusedHeadError" in strict.err


def test_only_the_first_process_of_a_launch_speaks(tmp_path: Path, ours: Ours) -> None:
    write(tmp_path, "import os\nprint('rank', os.environ['RANK'])\n")
    assert ours("program.py", cwd=tmp_path, RANK="3", LOCAL_RANK="0") == (0, "rank 3\n", "")


class Page(HTMLParser):
    """Checks that every element is closed, and keeps the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        links = [value or "" for name, value in attributes if name in ("src", "href")]
        self.outside += [link for link in links if not link.startswith("#")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_report_is_one_page_with_every_head_reason_and_graph(tmp_path: Path, ours: Ours) -> None:
    more = """
    def left(h, w, y):
        z = h @ w.T  # a < b & c
        return F.cross_entropy(z, y) + z.std()

    torch.compile(left)(torch.randn(8, 16), torch.randn(64, 16), torch.randint(0, 64, (8,)))
"""
    write(tmp_path, COMPILED + more)
    run = ours("--report", "out.html", "program.py", "an <argument>", cwd=tmp_path)
    assert run.code == 0, run.err
    page = Page((tmp_path / "out.html").read_text())
    text = " ".join(page.text)
    assert (page.open, page.outside) == ([], [])
    assert "program.py 'an <argument>'" in text
    assert "aten.std.correction runs over tokens" in text
    assert "z = h @ w.T  # a < b & c" in text  # the program's own line
    assert "torch.nn.functional.cross_entropy" in text  # the graph before
    assert "fusedhead.head_loss" in text  # and after


def test_a_report_that_cannot_be_written_does_not_change_the_outcome(tmp_path: Path, ours: Ours) -> None:
    (tmp_path / "there").mkdir()
    write(tmp_path, "import os\nos.rmdir('there')\nprint('done')\n")
    run = ours("--report", "there/out.html", "program.py", cwd=tmp_path)
    assert (run.code, run.out) == (0, "done\n")
    assert "the report could not be written" in run.err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/folder.html", "there is no folder no/such"),
        ("out.txt", "has to end in .html (a page) or .json (data)"),
        ("folder.html", "this is a folder"),
    ],
)
def test_the_path_of_a_report_is_looked_at_before_the_program_starts(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.html").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["run", "--report", path, write(tmp_path, "raise SystemError('it was started')").name])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_report_may_be_data(tmp_path: Path, ours: Ours) -> None:
    write(tmp_path, COMPILED)
    run = ours("--quiet", "--report", "out.json", "program.py", cwd=tmp_path)
    assert (run.code, run.err) == (0, "")
    data = json.loads((tmp_path / "out.json").read_text())
    assert (data["command"], data["heads_fused"], data["heads_left"]) == ("program.py", 1, 0)
    (head,) = data["heads"]
    assert (head["module"], head["vocab_size"], head["counts"]["calls"]) == ("head", 512, 3)
    assert data["bytes_saved"] == head["bytes_saved"] == head["bytes_logits"] - head["bytes_held"]


ARGPARSE = """
import argparse, logging
logging.basicConfig(level=logging.INFO)
parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
parser.parse_args()
"""


@pytest.mark.parametrize("arguments", [("--help",), ("--steps", "many")])
def test_nothing_is_added_to_a_programs_own_help_and_errors(
    arguments: tuple[str, ...], tmp_path: Path, ours: Ours
) -> None:
    write(tmp_path, ARGPARSE)
    told = ours("program.py", *arguments, cwd=tmp_path)
    assert told == ours("--quiet", "program.py", *arguments, cwd=tmp_path)
    assert "usage: program.py" in told.out + told.err
    assert "fusedhead" not in told.out + told.err


def test_a_programs_log_of_information_is_its_own(tmp_path: Path, ours: Ours) -> None:
    write(tmp_path, "import logging\nlogging.basicConfig(level=logging.INFO)\n" + COMPILED)
    run = ours("--quiet", "program.py", cwd=tmp_path)
    assert run.code == 0, run.err
    assert "fusedhead" not in run.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "nothing to run"),
        (["run", "--compile-eager"], "nothing to run"),
        (["run", "--bogus", "program.py"], "unrecognized arguments: --bogus"),
        (["run", "--memory", "huge", "program.py"], "memory='huge' is not valid"),
        (["walk", "program.py"], "invalid choice: 'walk'"),
        (["explain", "train"], "expected MODULE:FUNCTION"),
        (["explain", "nowhere:step"], "No module named 'nowhere'"),
        (["estimate"], "nothing to run"),
        (["estimate", "--chip", "abacus", "program.py"], "invalid choice: 'abacus'"),
    ],
)
def test_a_wrong_command_line_is_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


TORCHRUN = (
    MODEL
    + """
import sys
import torch._inductor.compile_fx
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

torch._inductor.compile_fx.compile_fx = lambda graph, *_, **settings: graph.forward  # what it was given, as it is
distributed.init_process_group("gloo")
torch.manual_seed(0)
model = torch.compile(DistributedDataParallel(Model()))
tokens = torch.randint(0, 512, (2, 16))
loss = model(tokens, tokens)
loss.backward()
# One write a rank: torchrun starts Python unbuffered, where print writes every word by itself.
sys.stdout.write(f"rank {distributed.get_rank()} of {distributed.get_world_size()} {loss.item():.3f}\\n")
distributed.destroy_process_group()
"""
)


def test_torchrun_runs_every_rank_on_fused_heads_and_prints_once(tmp_path: Path) -> None:
    write(tmp_path, TORCHRUN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = subprocess.run(
        [*launcher, "-m", "fusedhead", "run", "program.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(line.split()[1] for line in run.stdout.splitlines() if line.startswith("rank")) == [
        "0",
        "1",
    ]
    assert run.stderr.count("1 head fused") == 1

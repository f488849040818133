"""``fusedhead estimate``: a program on fake tensors, up to the line that reads a number."""

from __future__ import annotations

from pathlib import Path

from tests.run.forks import Ours
from tests.run.programs import COMPILED, EAGER, write


def test_estimate_follows_a_program_until_it_asks_for_a_number(tmp_path: Path, ours: Ours) -> None:
    big = COMPILED.replace("vocab=512, width=32", "vocab=50304, width=4096")
    path = write(tmp_path, big)
    line = 1 + next(at for at, text in enumerate(path.read_text().splitlines()) if "loss.item()" in text)
    run = ours("--chip", "h100", "program.py", cwd=tmp_path, command="estimate", FUSEDHEAD_MIN_LOGITS="0")
    assert run.code == 0, run.err
    assert "1 head in 1 graph" in run.out
    assert "N=32 D=4096 V=50304 float32: cross_entropy(mean, ignore_index=-100)" in run.out
    assert f"not followed further: program.py:{line}: DataDependentOutputException" in run.out


def test_estimate_says_what_to_do_where_nothing_is_compiled(tmp_path: Path, ours: Ours) -> None:
    write(tmp_path, EAGER.replace('print(f"{loss.item():.4f}")', "pass"))
    plain = ours("program.py", cwd=tmp_path, command="estimate")
    assert "--compile-eager looks at its models" in plain.err
    run = ours("--compile-eager", "program.py", cwd=tmp_path, command="estimate", FUSEDHEAD_MIN_LOGITS="0")
    assert run.code == 0, run.err
    assert "1 head in 1 graph" in run.out

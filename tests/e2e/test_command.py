"""fusedhead run on a script of transformers' Trainer, which does not know it, compiled or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from transformers import Trainer, TrainingArguments, set_seed
from tests.e2e.models import llama
from tests.e2e.text import examples

arguments = TrainingArguments(
    output_dir=sys.argv[1], max_steps=3, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
    report_to="none", use_cpu=True, disable_tqdm=True, torch_compile="compile" in sys.argv,
)
set_seed(0)
trainer = Trainer(llama(), arguments, train_dataset=examples(12))
trainer.train()
print("losses", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
"""


def losses(text: str) -> list[float]:
    (line,) = [line for line in text.splitlines() if line.startswith("losses")]
    return [float(x) for x in line.removeprefix("losses [").rstrip("]").split(", ")]


@pytest.mark.parametrize("way", ["compiled by the program", "compiled for the program"])
def test_a_trainer_script_is_run(way: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    arguments = [str(tmp_path / "train.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ours = ["-m", "fusedhead", "run", "--logits", "deferred", "--report", str(tmp_path / "out.html")]
    more = ["compile"] if "by" in way else []
    ours += [] if more else ["--compile-eager"]

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    plain, fused = run(*arguments), run(*ours, *arguments, *more)
    assert losses(fused.stdout) == pytest.approx(losses(plain.stdout), abs=1e-3)
    assert "fusedhead: 1 head fused" in fused.stderr
    assert "cross_entropy" in (tmp_path / "out.html").read_text()

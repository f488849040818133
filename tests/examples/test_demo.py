"""The demo's last line and exit status come from the report and from the measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import demo
import pytest

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(ours: list[float], *heads: SimpleNamespace) -> int:
        runs = {
            "inductor": measured([10.0, 9.0, 8.0], seconds=2.0, peak=1000),
            "fusedhead": measured(ours, seconds=1.5, peak=420),
        }
        monkeypatch.setattr(demo, "explain", lambda settings: SimpleNamespace(heads=list(heads)))
        monkeypatch.setattr(demo, "measure", lambda backend, settings: runs[backend])
        return demo.main()

    return run


def measured(losses: list[float], seconds: float, peak: int) -> dict:
    return {
        "settings": {"dtype": "fp32"},
        "losses": losses,
        "seconds": [9.0, seconds, seconds],
        "step_seconds": seconds,
        "peak_bytes": peak,
        "peak_of": "peak",
    }


FUSED = SimpleNamespace(fused=True, reason="", logits="never built")
REFUSED = SimpleNamespace(fused=False, reason="the logits are printed", logits="built")


def test_the_last_line_sums_up_what_was_measured(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([10.0, 9.0, 8.000004], FUSED) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "demo: 1 head fused, logits never built, peak memory 0.42x of inductor, step time 0.75x, "
        "max loss difference 4.0e-06"
    )


@pytest.mark.parametrize(
    ("report", "line"), [("never built", "never built"), ("deferred", "never built"), ("built", "built")]
)
def test_logits_that_were_built_are_not_called_never_built(
    run: Run, capsys: pytest.CaptureFixture[str], report: str, line: str
) -> None:
    assert run([10.0, 9.0, 8.0], SimpleNamespace(fused=True, reason="", logits=report)) == 0
    assert f", logits {line}, " in capsys.readouterr().out.splitlines()[-1]


def test_a_demo_without_a_fused_head_fails_with_the_reason(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([10.0, 9.0, 8.0], REFUSED) == 1
    assert "the logits are printed" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("last", [8.001, float("nan")])
def test_a_curve_that_rounding_does_not_explain_fails(run: Run, last: float) -> None:
    assert run([10.0, 9.0, last], FUSED) == 1


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_bfloat16_curves_that_go_apart_as_measured_ones_do_are_alike_and_a_loss_that_is_off_is_not() -> None:
    """Two curves of a GPU: single steps are up to 1.2 % apart from step 43 on, means of 20 steps half a percent."""
    inductor, ours = (
        json.loads((RESULTS / f"train_gpt_124M_{name}.json").read_text())["losses"]
        for name in ("inductor", "fusedhead")
    )
    assert demo.difference(list(zip(inductor, ours)), "bf16") == ""
    early = [*ours[:7], ours[7] * 1.005, *ours[8:]]
    assert demo.difference(list(zip(inductor, early)), "bf16").startswith("at step 7 the losses are")
    drifting = [loss * (1 + 0.0001 * max(0, step - 40)) for step, loss in enumerate(ours)]
    assert demo.difference(list(zip(inductor, drifting)), "bf16").startswith("the mean losses of steps")
    assert demo.difference([*zip(inductor[:99], ours[:99]), (inductor[99], float("nan"))], "bf16")

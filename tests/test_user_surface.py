"""What a user can see and set: names, options, environment, strictness, logs, traces, caches."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedhead
from fusedhead.analysis import strategies
from fusedhead.options import Options, split_options

V, D = 32, 8


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def unreadable(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).cumsum(0), y)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, D, requires_grad=True), torch.randn(V, D, requires_grad=True), torch.randint(0, V, (4,))


def test_the_backend_is_found_by_name_without_an_import() -> None:
    assert "fusedhead" in torch._dynamo.list_backends()


def test_an_unknown_option_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"fusedhead\.debg.*fusedhead\.debug.*fusedhead\.strict"):
        split_options({"fusedhead.debg": True})


def test_an_unknown_option_reaches_the_user_of_torch_compile() -> None:
    with pytest.raises(Exception, match=r"unknown option 'fusedhead\.memry'"):
        torch.compile(loss, backend="fusedhead", options={"fusedhead.memry": "min"})(*operands())


def test_inductors_options_are_validated_by_inductor() -> None:
    with pytest.raises(Exception, match="Unexpected optimization option no_such_option"):
        torch.compile(loss, backend="fusedhead", options={"no_such_option": True})(*operands())


@pytest.mark.parametrize(
    ("given", "expected"),
    [("auto", 0), ("min", -1), ("64", 64), (512, 512)],
)
def test_memory_is_auto_min_or_mebibytes(given: str | int, expected: int) -> None:
    assert split_options({"fusedhead.memory": given})[0].budget == expected


@pytest.mark.parametrize("bad", ["most", 0, -3, True])
def test_a_bad_memory_says_what_is_expected(bad: object) -> None:
    with pytest.raises(ValueError, match=r'"auto", "min" or a positive number of MiB'):
        split_options({"fusedhead.memory": bad})


def test_every_option_has_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"debug": "1", "strict": "true", "memory": "min", "logits": "eager", "min_logits": "5"}.items():
        monkeypatch.setenv(f"FUSEDHEAD_{name.upper()}", value)
    options, rest = split_options({"max_autotune": False, "fusedhead.memory": 7})
    assert options == Options(debug=True, strict=True, memory=7, logits="eager", min_logits=5)
    assert rest == {"max_autotune": False}


def test_mode_and_inductor_options_are_passed_on() -> None:
    h, w, y = operands()
    for inputs in ({"mode": "max-autotune-no-cudagraphs"}, {"options": {"epilogue_fusion": True}}):
        torch.testing.assert_close(torch.compile(loss, backend="fusedhead", **inputs)(h, w, y), loss(h, w, y))


def test_strict_raises_for_a_head_that_is_not_fused() -> None:
    with pytest.raises(Exception, match=r"strict.*is not fused: aten.cumsum.default runs over tokens"):
        torch.compile(unreadable, backend="fusedhead", options={"fusedhead.strict": True})(*operands())


def test_a_graph_the_pass_fails_on_is_compiled_by_inductor_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a surprise")

    monkeypatch.setattr(strategies, "interpret", broken)
    h, w, y = operands()
    with caplog.at_level(logging.WARNING, "fusedhead"):
        torch.testing.assert_close(torch.compile(loss, backend="fusedhead")(h, w, y), loss(h, w, y))
    assert [r.levelname for r in caplog.records if r.name == "fusedhead"] == ["WARNING"]
    assert "a surprise" in caplog.text
    assert "Traceback" in caplog.text


def test_strict_turns_an_error_in_the_pass_into_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "interpret", lambda *_: 1 / 0)
    with pytest.raises(Exception, match="the pass failed on this graph"):
        torch.compile(loss, backend="fusedhead", options={"fusedhead.strict": True})(*operands())


def test_debug_prints_the_table_and_the_rewritten_graph(capsys: pytest.CaptureFixture) -> None:
    torch.compile(loss, backend="fusedhead", options={"fusedhead.debug": True})(*operands())
    printed = capsys.readouterr().out
    assert "1 head fused" in printed
    assert "fusedhead.head_loss" in printed


def test_explain_says_what_was_fused() -> None:
    h, w, y = operands()
    report = fusedhead.explain(loss)(h, w, y)
    (head,) = report.heads
    assert head.fused
    assert head.reason == ""
    assert head.where.startswith("test_user_surface.py:")
    assert head.computes == "cross_entropy(mean, ignore_index=-100)"
    assert (head.tokens, head.hidden_size, head.vocab_size) == (4, D, V)
    assert head.logits == "never built"
    assert head.bytes_logits == 4 * V * 4
    assert head.bytes_saved == head.bytes_logits - head.workspace_bytes
    assert f"{head.bytes_saved / 2**20:,.1f} MiB" in str(report)
    assert "cross_entropy" in report.before
    assert "cross_entropy" not in report.after.replace("F.cross_entropy", "")
    assert "1 head fused" in str(report)


def test_explain_says_why_a_head_was_left() -> None:
    (head,) = fusedhead.explain(unreadable)(*operands()).heads
    assert not head.fused
    assert head.reason.startswith("aten.cumsum.default runs over tokens")
    assert "test_user_surface.py:" in head.reason
    assert head.logits == "built"


def test_a_graph_without_a_head_says_so() -> None:
    report = fusedhead.explain(lambda x: x.sin())(torch.randn(3))
    assert report.heads == []
    assert "no projection with a loss" in str(report)


# A head of a scale that no other program has: no cache knows it, whichever ran before.
PROGRAM = """
import json, os, sys, torch, torch.nn.functional as F
from torch._dynamo.utils import counters
torch.manual_seed(0)
h, w = torch.randn(4, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
y = torch.randint(0, 32, (4,))
torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w) * SCALE, y), backend="fusedhead")(h, w, y).backward()
print(json.dumps({**counters["aot_autograd"], "grad": h.grad.sum().item()}), flush=True)
os._exit(0)  # to take such a process apart takes seconds
"""


def run_program(scale: float, **environment: str) -> tuple[dict, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("SCALE", repr(scale))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_logs_and_traces_show_the_graph_and_the_compile_cache_hits_until_an_upgrade(tmp_path: Path) -> None:
    """One program, three processes: each imports torch and compiles, which takes seconds."""
    scale, trace = 1 + uuid.uuid4().int / 2**129, tmp_path / "trace"
    first, log = run_program(scale, TORCH_LOGS="+fusedhead", TORCH_TRACE=str(trace))
    assert first["autograd_cache_miss"] == 1
    assert "fused  " in log
    assert "fusedhead.head_loss" in log
    (traced,) = (path.read_text() for path in trace.glob("*.log"))
    assert "fusedhead_rewritten_graph" in traced
    assert "fusedhead.head_loss" in traced
    again, _ = run_program(scale)
    assert again["autograd_cache_hit"] == 1
    assert again["grad"] == first["grad"]
    package = tmp_path / "site" / "fusedhead"
    shutil.copytree(Path(fusedhead.__file__).parent, package)
    with (package / "lowering" / "autograd.py").open("a") as file:
        file.write("# an upgrade\n")
    upgraded, _ = run_program(scale, PYTHONPATH=str(package.parent))
    assert upgraded["autograd_cache_miss"] == 1

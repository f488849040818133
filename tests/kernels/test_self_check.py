"""Kernels that may not work everywhere are tried in a process of their own, and nothing that goes wrong there reaches
the program."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from fusedhead.kernels import self_check
from fusedhead.kernels.torch_engine import engine as torch_engine
from fusedhead.kernels.triton_engine import self_check as triton_self_check
from fusedhead.kernels.triton_engine.self_check import (
    Trial,
    by_eager,
    difference,
    one_pass_and_sweeps,
    random_head,
    truth,
)

GPU = torch.device("cuda", 0)
ANSWER = "import json; print('ready'); print(json.dumps({'serves': %s, 'reason': '%s'}))"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path, caplog):
    """A GPU with a name and a file of its own; nothing decided yet."""
    monkeypatch.setenv("FUSEDHEAD_SELF_CHECK", str(tmp_path / "deep" / "self_check.json"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"chip {index}")
    monkeypatch.setattr(self_check, "_uuid", lambda index: "")
    monkeypatch.setattr(self_check, "_decided", {})
    monkeypatch.setattr(self_check, "_running", {})
    caplog.set_level("INFO", "fusedhead")


def child(monkeypatch, code: str) -> list[subprocess.Popen]:
    """Let children run this code; those that were started."""
    started: list[subprocess.Popen] = []
    begin = subprocess.Popen

    def recorded(*args, **kwargs):
        started.append(begin(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(self_check, "CHILD", code.replace("{", "{{").replace("}", "}}"))
    monkeypatch.setattr(self_check.subprocess, "Popen", recorded)
    return started


def forget() -> None:
    """As a new process would begin."""
    self_check._decided.clear()


def test_a_verdict_is_asked_for_once_and_kept_for_later_processes(monkeypatch):
    started = child(monkeypatch, ANSWER % (True, ""))
    assert [self_check.serves("pairs", GPU) for _ in range(3)] == [True] * 3
    forget()
    assert self_check.serves("pairs", GPU)
    assert len(started) == 1
    (kept,) = json.loads(self_check.kept_in().read_text()).items()
    assert kept[0].startswith("pairs, chip 0, Triton ")
    assert kept[1] == {"serves": True, "reason": ""}


def test_other_kernels_and_other_chips_have_checks_of_their_own(monkeypatch):
    started = child(monkeypatch, ANSWER % (True, ""))
    assert self_check.serves("pairs", GPU)
    assert self_check.serves("triton", GPU)
    assert self_check.serves("pairs", torch.device("cuda", 1))
    assert len(started) == 3


def test_changed_kernels_are_checked_again(monkeypatch):
    started = child(monkeypatch, ANSWER % (True, ""))
    self_check.serves("pairs", GPU)
    forget()
    monkeypatch.setattr(self_check, "_sources", lambda: "others")
    self_check.serves("pairs", GPU)
    assert len(started) == 2


def test_kernels_that_differ_do_not_serve_and_the_warning_says_why(monkeypatch, caplog):
    child(monkeypatch, ANSWER % (False, "dw of a head errs"))
    assert not self_check.serves("pairs", GPU)
    assert "dw of a head errs" in caplog.text
    assert str(self_check.kept_in()) in caplog.text
    caplog.clear()
    forget()
    assert not self_check.serves("pairs", GPU)
    assert not caplog.text  # it was said once


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; print('ready', flush=True); os.abort()", "exit code -6"),
        ("print('ready', flush=True); raise SystemExit('an illegal memory access')", "an illegal memory access"),
    ],
)
def test_kernels_that_take_their_process_with_them_do_not_serve(monkeypatch, caplog, code, said):
    child(monkeypatch, code)
    assert not self_check.serves("pairs", GPU)
    assert said in caplog.text
    forget()
    started = child(monkeypatch, ANSWER % (True, ""))
    assert not self_check.serves("pairs", GPU)
    assert not started  # the verdict was kept


def test_a_program_does_not_wait_longer_than_the_kernels_are_worth(monkeypatch):
    monkeypatch.setitem(self_check.PATIENCE, "pairs", 0.1)
    (started := child(monkeypatch, "import time; print('ready', flush=True); time.sleep(60)"))
    assert not self_check.serves("pairs", GPU)
    assert started[0].poll() is None  # it goes on, and keeps what it finds
    assert not self_check.kept_in().exists()
    self_check._end()


def test_kernels_that_nobody_waited_for_and_that_hang_are_known_to_when_the_program_ends(monkeypatch):
    monkeypatch.setitem(self_check.PATIENCE, "pairs", 1.0)
    child(monkeypatch, "import time; print('ready', flush=True); time.sleep(60)")
    assert not self_check.serves("pairs", GPU)
    assert not self_check.kept_in().exists()
    monkeypatch.setattr(self_check, "LIMIT", 0.5)
    self_check._end()
    (kept,) = json.loads(self_check.kept_in().read_text()).values()
    assert kept == {"serves": False, "reason": "no answer within 0.5 s"}


def test_kernels_that_hang_do_not_serve(monkeypatch, caplog):
    monkeypatch.setattr(self_check, "LIMIT", 1)
    (started := child(monkeypatch, "import time; print('ready', flush=True); time.sleep(60)"))
    assert not self_check.serves("pairs", GPU)
    assert "no answer within 1 s" in caplog.text
    assert started[0].returncode is not None  # nothing is left behind


def test_a_check_that_could_not_be_made_is_no_verdict(monkeypatch):
    child(monkeypatch, "raise MemoryError('CUDA out of memory')")
    assert not self_check.serves("pairs", GPU)
    assert not self_check.kept_in().exists()
    forget()
    child(monkeypatch, ANSWER % (True, ""))
    assert self_check.serves("pairs", GPU)


def test_where_no_process_can_be_started_the_trusted_kernels_serve(monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError("no second process here")

    monkeypatch.setattr(self_check.subprocess, "Popen", refused)
    self_check.start("pairs", GPU)
    assert not self_check.serves("pairs", GPU)


def test_a_verdict_that_cannot_be_kept_counts_for_this_process(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDHEAD_SELF_CHECK", str(tmp_path / "file" / "self_check.json"))
    child(monkeypatch, ANSWER % (True, ""))
    assert self_check.serves("pairs", GPU)


@pytest.mark.parametrize("text", ["{", "[]", '{"pairs": 3}'])
def test_a_damaged_file_is_written_anew(monkeypatch, text):
    self_check.kept_in().parent.mkdir(parents=True)
    self_check.kept_in().write_text(text)
    started = child(monkeypatch, ANSWER % (True, ""))
    assert self_check.serves("pairs", GPU)
    forget()
    assert self_check.serves("pairs", GPU)
    assert len(started) == 1


def test_a_check_begins_beside_the_compilation_and_once(monkeypatch):
    started = child(monkeypatch, ANSWER % (True, ""))
    for _ in range(3):
        self_check.start("pairs", GPU)
    assert self_check.serves("pairs", GPU)
    self_check.start("pairs", GPU)
    assert len(started) == 1


def test_a_fork_does_not_wait_for_its_parents_child(monkeypatch):
    child(monkeypatch, ANSWER % (True, ""))
    self_check.start("pairs", GPU)
    (check,) = self_check._running.values()
    forked = os.getpid() + 1
    monkeypatch.setattr(self_check.os, "getpid", lambda: forked)
    assert not self_check.serves("pairs", GPU)
    check.process.communicate()


def test_a_program_that_ends_leaves_no_child(monkeypatch):
    (started := child(monkeypatch, "import time; time.sleep(60)"))
    self_check.start("pairs", GPU)
    self_check._end()
    assert started[0].returncode is not None


BF16 = torch.bfloat16
SMALL = Trial(((40, 300, 24, 2, "", BF16), (30, 200, 16, 1, triton_self_check.CAP, torch.float16)), 1.1, 1e-6)


def by_torch(head, upstream):
    return one_pass_and_sweeps(torch_engine, head, upstream)


def test_an_engine_agrees_with_eager_code(monkeypatch):
    monkeypatch.setattr(triton_self_check, "WHOLE_ROWS", 16)
    assert difference(SMALL._replace(slack=1.5, floor=1e-5), by_torch, by_eager, torch.device("cpu")) == ""


def test_kernels_agree_with_themselves(monkeypatch):
    monkeypatch.setattr(triton_self_check, "WHOLE_ROWS", 16)
    assert difference(SMALL, by_torch, by_torch, torch.device("cpu")) == ""


def test_the_truth_is_the_definition_and_its_derivative():
    head, upstream = random_head(7, 30, 5, 2, "", BF16, torch.device("cpu"))
    result = truth(head, upstream)
    z = head.h.double() @ head.w.double().T
    dz = z.softmax(1) * upstream.lse[:, None]
    dz.scatter_add_(1, head.y, upstream.picked.double())
    torch.testing.assert_close(result.dh, dz @ head.w.double(), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(result.dw, dz.T @ head.h.double(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda result: result._replace(dw=result.dw * 1.01), "dw of a head"),
        (lambda result: result._replace(dh=result.dh.index_fill(0, torch.tensor(3), float("nan"))), "dh of a head"),
        (lambda result: result._replace(lse=result.lse + 1e-4), "lse of a head"),
        (lambda result: result._replace(picked=result.picked + 1e-6 * torch.rand(())), "differ from run to run"),
    ],
)
def test_kernels_that_err_are_found(monkeypatch, wrong, said):
    monkeypatch.setattr(triton_self_check, "WHOLE_ROWS", 16)
    asked = lambda *inputs: map(wrong, by_torch(*inputs))  # noqa: E731
    assert said in difference(SMALL, asked, by_torch, torch.device("cpu"))

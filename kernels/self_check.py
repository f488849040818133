"""Self-checks: kernels that may not work everywhere are tried once in a child process, and the verdict is saved.

    serves("pairs", device)      the paired sweeps (`ring`), whose language changes with Triton
    serves("float8", device)     the sweep and the products of gradients in float8
    serves("triton", device)     the whole Triton engine, on a chip that no test has run on

A kernel on a new chip or in a new language may fail to compile, give wrong numbers, hang, or leave the GPU unusable for
its process. To keep this away from a user's program, a child process runs small heads and compares them with trusted
kernels. The verdict holds for one GPU model, version of Triton and state of these sources. A check takes most of a
minute, mostly to compile; `start` runs it beside a model's compilation. Where the check has not ended in time, or
cannot be made (no memory, no second process allowed), this process uses the trusted kernels.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedhead.kernels.user_cache import cache_file, read_json, write_json

log = logging.getLogger("fusedhead")
LIMIT = 300  # seconds after which a check counts as hung
# seconds that a program waits: plain sweeps are almost as fast as pairs
PATIENCE = {"pairs": 20, "float8": 20, "triton": LIMIT}
FIRST_LINE = "ready"  # the child's first line; a failure after it is the kernels'
CHILD = (
    "import sys; sys.path[:] = {path!r}; "
    "from fusedhead.kernels.triton_engine.self_check import main; main({argument!r})"
)
FALLBACK = {
    "pairs": "the plain sweeps serve in place of the paired ones",
    "float8": "exact products serve in place of float8 ones",
    "triton": "the torch engine serves in place of the Triton engine",
}


class Claim(NamedTuple):
    """Kernels by name, and the index of the GPU on which they are to run."""

    name: str
    gpu: int


class _Check(NamedTuple):
    process: subprocess.Popen[str]
    owner: int  # the process that started it; a fork must not wait for it
    started: float  # time.monotonic()


_lock = threading.RLock()
_decided: dict[Claim, bool] = {}
_running: dict[Claim, _Check] = {}


def serves(name: str, device: torch.device) -> bool:
    """Whether the kernels ``name`` work on this device. Waits for a running check."""
    claim = _claim(name, device)
    verdict = _decided.get(claim)
    if verdict is None:
        with _lock:
            verdict = _decided.get(claim)
            if verdict is None:
                verdict = _decided[claim] = _kept_or_checked(claim)
    return verdict


def start(name: str, device: torch.device) -> None:
    """Start the check in the background where one is needed, so that `serves` waits less."""
    claim = _claim(name, device)
    with _lock:
        if claim not in _decided and claim not in _running and _kept(claim) is None:
            _begin(claim)


def decide(name: str, device: torch.device, verdict: bool) -> None:
    """Set the verdict for this process without a check. For checks themselves, and for tests."""
    _decided[_claim(name, device)] = verdict


def kept_in() -> Path:
    """The file of verdicts: $FUSEDHEAD_SELF_CHECK, else fusedhead/self_check.json in the user's cache."""
    return cache_file("self_check.json", "FUSEDHEAD_SELF_CHECK")


def _claim(name: str, device: torch.device) -> Claim:
    return Claim(name, torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=1)
def _sources() -> str:
    """A digest of the kernels' sources, which a verdict depends on."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _key(claim: Claim) -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:  # a custom build, or ROCm's under another name
        import triton as module

        triton = module.__version__
    return f"{claim.name}, {torch.cuda.get_device_name(claim.gpu)}, Triton {triton}, kernels {_sources()}"


def _kept(claim: Claim) -> bool | None:
    remedy = "delete it: the check is made again"
    entry = read_json(kept_in(), remedy).get(_key(claim))
    return bool(entry["serves"]) if isinstance(entry, dict) and "serves" in entry else None


def _kept_or_checked(claim: Claim) -> bool:
    kept = _kept(claim)
    if kept is not None:
        return kept
    check = _running.pop(claim, None) or (_begin(claim) and _running.pop(claim))
    if not check or check.owner != os.getpid():
        return False
    answer = _answer(check, PATIENCE[claim.name])
    if answer is None:
        _running[claim] = check  # the check goes on, and its verdict is saved for the next process
        log.info("fusedhead: the self-check of %s has not ended yet; %s", claim.name, FALLBACK[claim.name])
        return False
    return _verdict(claim, *answer)


def _begin(claim: Claim) -> bool:
    """Start the child; returns whether that was possible."""
    argument = {"claim": claim.name, "index": claim.gpu, "uuid": _uuid(claim.gpu), "key": _key(claim)}
    code = CHILD.format(path=sys.path, argument=json.dumps(argument))
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        log.info("fusedhead: the self-check of %s cannot be started (%s); %s", claim.name, error, FALLBACK[claim.name])
        return False
    _running[claim] = _Check(process, os.getpid(), time.monotonic())
    return True


def _uuid(index: int) -> str:
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))


def _answer(check: _Check, patience: float) -> tuple[list[str], str] | None:
    """(the child's lines, the sentence how it failed); None while it is running."""
    process = check.process
    left = check.started + LIMIT - time.monotonic()
    try:
        out, errors = process.communicate(timeout=max(0.0, min(patience, left)))
    except subprocess.TimeoutExpired:
        if patience < left:
            return None
        process.kill()
        out, errors = process.communicate()
        return out.splitlines(), f"no answer within {LIMIT} s"
    last = (errors.strip().splitlines() or [""])[-1]
    return out.splitlines(), f"it ended with exit code {process.returncode}: {last}" if process.returncode else ""


def _verdict(claim: Claim, lines: list[str], problem: str) -> bool:
    """The verdict of the child's answer; saved where it is about the kernels."""
    answers = [line for line in lines if line.startswith("{")]
    if FIRST_LINE not in lines or (not answers and not problem):
        log.info(
            "fusedhead: the self-check of %s could not be made (%s); %s", claim.name, problem, FALLBACK[claim.name]
        )
        return False
    entry: dict[str, Any] = json.loads(answers[-1]) if answers else {"serves": False, "reason": problem}
    if not entry["serves"]:
        log.warning(
            "fusedhead: the self-check of %s failed on %s: %s. %s. The verdict is kept in %s",
            claim.name, torch.cuda.get_device_name(claim.gpu), entry["reason"], FALLBACK[claim.name], kept_in(),
        )  # fmt: skip
    keep_verdict(_key(claim), entry)
    return bool(entry["serves"])


def keep_verdict(key: str, verdict: dict[str, Any]) -> None:
    """Save a verdict for later processes, where the folder can be written."""
    try:
        write_json(kept_in(), read_json(kept_in(), "it is written anew") | {key: verdict})
    except OSError as error:
        log.info("fusedhead: the self-check's verdict cannot be kept (%s)", error)


@atexit.register
def _end() -> None:
    """At exit: do not wait for a check. One that has hung by then has failed."""
    for claim, check in _running.items():
        if check.owner == os.getpid():
            hung = check.process.poll() is None and time.monotonic() - check.started > LIMIT
            check.process.kill()
            lines = check.process.communicate()[0].splitlines()
            if hung:
                _verdict(claim, lines, f"no answer within {LIMIT} s")

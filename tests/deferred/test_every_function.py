"""Every method, attribute and function of a tensor, on a deferred one and the real one: results, errors, logs.

They run in a child process, so that one that ends it, or hangs, is a difference like any other; what ends the process
in eager code is none. Children are forks of a process that has imported torch and started no thread: a fork of this
one would have a part of torch's pools of threads, and locks that nobody opens.

    FUSEDHEAD_EVERY_FUNCTION=1 python -m pytest tests/deferred/test_every_function.py    # all; else one in some
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest

from tests.deferred.compared_calls import CALLS, run

EVERY = bool(os.environ.get("FUSEDHEAD_EVERY_FUNCTION"))
STRIDE = {"attributes": 24, "functions": 160}
LONGEST = 120  # seconds for one call


@pytest.fixture(scope="module")
def clean() -> ForkServerContext:
    """What starts children; the process that they are forks of starts with the first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run.__module__])
    return context


def in_children(kind: str, stride: int, context: ForkServerContext) -> list[str]:
    """The differences of all calls."""
    names = [name for name, _ in CALLS[kind]()][::stride]
    result, at = [], 0
    while at < len(names):
        ours, theirs = context.Pipe()
        child = context.Process(target=run, args=(kind, stride, at, theirs))
        child.start()
        theirs.close()
        begun: Any = (at, 0)
        try:
            while ours.poll(LONGEST):
                at, said = ours.recv()
                begun = (at, said) if isinstance(said, int) else None
                result += [said] if isinstance(said, str) and said else []
            result.append(f"{names[at]}: hangs")
        except EOFError:
            if begun is not None and begun[1] == 1:
                child.join()
                result.append(f"{names[at]}: ends the process ({child.exitcode})")
        child.kill()
        child.join()
        at += 1
    return result


@pytest.mark.parametrize("kind", CALLS)
def test_they_do_to_deferred_logits_what_they_do_to_real_ones(
    kind: str, clean: ForkServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what the process that is forked is started with
    differences = in_children(kind, 1 if EVERY else STRIDE[kind], clean)
    assert not differences, "\n".join(differences)

"""What all tests share: a compile cache of their own, one thread a worker, a fixed seed, no graphs left over."""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

# Read when torch and Inductor are imported, so set before. Workers of xdist inherit them.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers a worker starves the tests
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # as many workers as cores: more threads would wait for one another

# What is imported stays: to look through it for garbage is a fifth of the time that importing takes, and a twentieth
# of what the tests then take. So nothing is collected until all is imported, and that is left out until the end.
gc.disable()

import torch  # noqa: E402

from tests.order import place, scheduler  # noqa: E402

# Read when triton is imported, so set before: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
ACCELERATED = torch.accelerator.is_available()
# Tests are about small heads, which would be left to Inductor.
os.environ.setdefault("FUSEDHEAD_MIN_LOGITS", "0")


def pytest_configure(config: pytest.Config) -> None:
    """Compile from nothing, so that no result of an older version of the pass is what passes or fails a test.

    TORCHINDUCTOR_CACHE_DIR in the environment keeps the cache between runs.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="fusedhead-tests-", ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)


def leave_compilations_untraced() -> None:
    """pytest listens to every logger that does not propagate, torch's trace among them.

    With a listener each compilation prints its graphs, guards and tensors for it, which no test reads. The trace that
    TORCH_TRACE asks for is written as ever.
    """
    trace = logging.getLogger("torch.__trace")

    def add(handler: logging.Handler) -> None:
        if not type(handler).__module__.startswith("_pytest."):
            logging.Logger.addHandler(trace, handler)

    trace.addHandler = add


leave_compilations_untraced()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if addressed := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(
            f"{addressed[0]} is named by an address, which every worker has its own of: give it ids="
        )
    items.sort(key=lambda item: place(item.nodeid))


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduler(config, log)


@pytest.fixture(autouse=True)
def the_package_s_log_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reads the log hears it, whatever a test before it has done to the logger."""
    log = logging.getLogger("fusedhead")
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "disabled", False)
    log.setLevel(logging.WARNING)  # the fuzzers' runners set CRITICAL, for their whole process


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extensions say, when the process ends, that what they made has leaked


def leave_guards_untimed() -> None:
    """Dynamo flushes the CPU's caches and times the guards of all it compiles: for its log, a sixth of a small program.

    A torch that has no such function, or another, is left as it is.
    """
    guards = sys.modules.get("torch._dynamo.guards")
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0


@pytest.fixture
def group() -> Iterator[str]:
    """The name of a process group of this process alone."""
    from tests.one_rank import one_rank  # torch.distributed, which few tests import

    with one_rank() as name:
        yield name


def seeded() -> None:
    """What `torch.manual_seed` does, which for each kind of device that is not there keeps the stack of every call."""
    (torch.manual_seed if ACCELERATED else torch.default_generator.manual_seed)(0)


@pytest.fixture(autouse=True)
def fresh_torch() -> Iterator[None]:
    """The same random numbers for every test, in any order, and nothing compiled by the test before."""
    leave_guards_untimed()
    seeded()
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

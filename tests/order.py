"""The order of the tests, for workers of xdist that end together, and which tests stay in one worker.

The tests of a file share what they compile, and some files share a process that took seconds to start: they are one
group, which one worker runs. Groups that take long come first; what takes milliseconds comes last, test by test.
"""

from __future__ import annotations

from typing import Any

# Paths of tests, a group in a line, the longest first. A file that is in none is a group by itself.
TOGETHER = (
    "tests/kernels/test_kernels_compile.py",
    "tests/lowering/test_vector_widths.py",
    "tests/deferred/test_state_machine.py",
    "tests/compat/test_torch_internals.py",  # a process that forks
    "tests/distributed tests/functional/test_vocab_parallel.py tests/functional/test_failures.py "
    "tests/legality/test_sharding.py tests/benchmarks/test_parallel_benchmark.py "
    "tests/benchmarks/test_several_gpus.py tests/canonicalize/test_localize_shards.py "
    "tests/deferred/test_gathered_weights.py tests/examples/test_example_programs.py",  # one that forks ranks
    "tests/run tests/test_user_surface.py",  # one that forks commands
    "tests/benchmarks/test_head_benchmark.py",
    "tests/mutations/test_every_op.py",
    "tests/packaging",
    "tests/test_backend.py",
    "tests/fuzz/test_fuzz.py",
)
ALONE = ("tests/kernels/test_kernels_compile.py", "tests/fuzz/test_fuzz.py")  # each test by itself
LAST = ("tests/rules", "tests/ir", "tests/report")  # as well, and last


def place(test: str) -> int:
    """Where a test's group stands among those in ``TOGETHER``; behind them if in none."""
    positions = (at for at, paths in enumerate(TOGETHER) if any(test.startswith(path) for path in paths.split()))
    return next(positions, len(TOGETHER) + test.startswith(LAST))


def group(test: str) -> str:
    """The name of the group that a test is not to be parted from."""
    if test.startswith((*ALONE, *LAST)):
        return test
    at = place(test)
    return test.partition("::")[0] if at >= len(TOGETHER) else str(at)


def scheduler(config: Any, log: Any) -> Any:
    """What hands groups to xdist's workers as they get free, in the order in which they were collected.

    The mark ``xdist_group`` would do, but that xdist 3.8 writes a group into the ids of tests, which pytest 9.2
    computes anew: no test stays with another.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)

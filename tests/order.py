"""The order of the tests, for two workers of xdist that end together.

Tests that share something which takes seconds to make stay in one worker. They and those that take long come first;
what takes milliseconds comes last, and one at a time.
"""

from __future__ import annotations

# Paths of tests, a group in a line, the longest first.
TOGETHER = (
    "tests/kernels/test_kernels_compile.py",
    "tests/lowering/test_vector_widths.py",
    "tests/deferred/test_state_machine.py",
    "tests/compat/test_torch_internals.py",  # a process that forks
    "tests/distributed tests/functional/test_vocab_parallel.py tests/legality/test_sharding.py "
    "tests/benchmarks/test_parallel_benchmark.py tests/examples/test_example_programs.py",  # one that forks ranks
    "tests/run",  # one that forks commands
    "tests/benchmarks/test_head_benchmark.py",
    "tests/mutations/test_every_op.py",
    "tests/packaging",
    "tests/test_user_surface.py",
    "tests/test_backend.py",
    "tests/fuzz/test_fuzz.py",
)
ALONE = ("tests/kernels/test_kernels_compile.py", "tests/fuzz/test_fuzz.py")  # each test by itself


def place(test: str) -> int:
    """Which group a test belongs to, by its name; their number if to none."""
    positions = (at for at, paths in enumerate(TOGETHER) if any(test.startswith(path) for path in paths.split()))
    return next(positions, len(TOGETHER))


def group(test: str) -> str | None:
    """The name of the group that a test is not to be parted from."""
    at = place(test)
    return None if at == len(TOGETHER) or test.startswith(ALONE) else str(at)

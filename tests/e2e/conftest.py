"""Real packages warn about their own affairs, and must not reach for a network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import comparison

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_DISABLED="true",
    ACCELERATE_USE_CPU="true",
    TRL_EXPERIMENTAL_SILENCE="1",
    FUSEDHEAD_MIN_LOGITS="0",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def _peaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test's programs held at their peaks goes into its report."""
    comparison.PEAKS.clear()
    yield
    request.node.user_properties += [("peaks", peaks) for peaks in comparison.PEAKS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Peak memory of every training, MiB of torch's CPU allocator."""
    rows = [
        (report.nodeid.split("::")[-1], peaks)
        for report in terminalreporter.getreports("")  # of setups and teardowns
        for name, peaks in report.user_properties
        if name == "peaks"
    ]
    if rows:
        terminalreporter.write_sep("-", "peak memory in MiB: eager, Inductor, fusedhead")
        for name, peaks in rows:
            terminalreporter.write_line(f"{name:76}" + "".join(f"{peak / 2**20:9.1f}" for peak in peaks))

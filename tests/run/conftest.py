"""The command, ready to be run, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.run.forks import Ours, forks


@pytest.fixture(scope="session")
def ours() -> Iterator[Ours]:
    with forks() as run:
        yield run

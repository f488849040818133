"""Eager heads are switched off after each test, and their reports are summed up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import nn

import fusedhead
from fusedhead.eager import heads
from fusedhead.report import observers
from fusedhead.report.summary import Summary
from tests.eager.models import ORIGINAL


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    yield
    fusedhead.disable()
    for module in list(heads.HEADS):
        del heads.HEADS[module]
    nn.Linear.forward = ORIGINAL  # type: ignore[method-assign]


@pytest.fixture
def summary() -> Iterator[Summary]:
    heard = Summary()
    remove = observers.add(heard.add)
    yield heard
    remove()

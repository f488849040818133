"""The model that most tests of deferred logits begin with."""

from __future__ import annotations

import pytest

from tests.deferred.heads import Model


@pytest.fixture
def model() -> Model:
    return Model()

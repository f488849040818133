"""Real packages warn about their own affairs, and must not reach for a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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

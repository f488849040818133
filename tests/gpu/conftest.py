"""These tests need a CUDA device; `make gpu` runs them there, and without one this folder is not collected."""

import warnings
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def synchronizations_are_allowed() -> Iterator[None]:
    """A test that forbids them leaves nothing behind. Torch warns once, when the mode is first set, and sets it; an
    error made of that warning would leave the mode on for every test that follows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("default")
    yield
    torch.cuda.set_sync_debug_mode("default")

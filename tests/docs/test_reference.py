"""The reference names every option and its variable, and no other; its table of what is fused is the code's."""

from __future__ import annotations

import re
from pathlib import Path

from fusedhead.options import ENVIRONMENT, PREFIX, READERS

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
OPTIONS = (REFERENCE / "options.md").read_text(encoding="utf-8")


def test_the_options_of_the_reference_are_the_backends() -> None:
    assert set(re.findall(rf"^\| `{re.escape(PREFIX)}(\w+)` \|", OPTIONS, re.MULTILINE)) == set(READERS)


def test_the_variables_of_the_reference_are_the_backends() -> None:
    assert set(re.findall(rf"\| `{ENVIRONMENT}(\w+)` \|", OPTIONS)) == {name.upper() for name in READERS}

"""The README names every option and its variable, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from fusedhead.options import ENVIRONMENT, PREFIX, READERS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_options_of_the_readme_are_the_backends() -> None:
    assert set(re.findall(rf"^\| `{re.escape(PREFIX)}(\w+)` \|", README, re.MULTILINE)) == set(READERS)


def test_the_variables_of_the_readme_are_the_backends() -> None:
    assert set(re.findall(rf"\| `{ENVIRONMENT}(\w+)` \|", README)) == {name.upper() for name in READERS}

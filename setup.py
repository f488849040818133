"""The one thing that pyproject.toml cannot say: README.md as a package index can show it.

An index shows the README alone, so relative links lead nowhere there. With a `Source` among the project's URLs they
become absolute, at this version's tag; without one a link becomes its text and a picture is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

# code first, so that what looks like a link in it is left alone
LINK = re.compile(r"^```.*?^```|`[^`\n]*`|(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)", re.MULTILINE | re.DOTALL)


def for_an_index(text: str, source: str = "", version: str = "") -> str:
    """The text with its relative links absolute under ``source``, or without them."""

    def link(match: re.Match[str]) -> str:
        picture, said, target = match[1], match[2], match[3]
        if target is None:
            return match[0]
        if source:
            return f"{picture}[{said}]({source}/{'raw' if picture else 'blob'}/v{version}/{target})"
        return "" if picture else said

    return LINK.sub(link, text)


def named(pattern: str, file: str, default: str = "") -> str:
    found = re.search(pattern, Path(file).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else default


if __name__ == "__main__":
    readme = Path("README.md").read_text(encoding="utf-8")
    source = named(r'^Source = "(.*)"', "pyproject.toml").rstrip("/")
    version = named(r'^__version__ = "(.*)"', "fusion_pass/version.py")
    setup(long_description=for_an_index(readme, source, version), long_description_content_type="text/markdown")

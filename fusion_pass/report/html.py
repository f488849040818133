"""HTML of heads: the templates, the cards of a page, and the table that a notebook shows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound

from fusedhead.report.estimates import Estimate, worth
from fusedhead.report.head_record import HeadRecord, plural
from fusedhead.report.terminal import Overview, head_name, left_first, saved_line

SOURCE_LINES = 8


def file_text(name: str) -> str:
    return resources.files("fusedhead.report").joinpath(name).read_text(encoding="utf-8")


class _Files(BaseLoader):
    """Templates beside this file, which also works where the package is in an archive."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, str | None, Any]:
        try:
            return file_text(template), template, lambda: True
        except OSError as error:
            raise TemplateNotFound(template) from error


@cache
def environment() -> Environment:
    templates = Environment(
        loader=_Files(), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(size=size, quantity=quantity, sentence=sentence, plural=plural)
    return templates


class Card(NamedTuple):
    """The data of one head's card."""

    number: int
    head: HeadRecord
    name: str
    worth: Estimate
    remarks: list[str]  # besides the reason
    source: str  # the program's own lines


def cards(heads: Sequence[HeadRecord]) -> list[Card]:
    return [
        Card(at, head, head_name(head), worth(head), head.remarks()[bool(head.reason) :], source(head))
        for at, head in enumerate(left_first(heads), 1)
    ]


def notebook(overview: Overview) -> str:
    """The totals and the table, for ``_repr_html_``."""
    template = environment().get_template("notebook.html.jinja")
    return template.render(overview=overview, saved=saved_line(overview.saved), cards=cards(overview.heads))


def source(head: HeadRecord) -> str:
    lines = [line for line in head.source.rstrip().splitlines() if set(line.strip()) - set("^~ ")]
    return "\n".join(line[2:] for line in lines[-SOURCE_LINES:])


def sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def size(count: float) -> str:
    """A number of bytes as text: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def quantity(count: float) -> str:
    """1.2e12 as "1.2 T"."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 1000:
            return f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} P"

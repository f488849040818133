"""The report as plain data, for programs: ``report.to_dict()`` and ``fusedhead run --report out.json``.

Every number is in bytes, FLOP or seconds. The names are stable; others may be added.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch

from fusedhead.report.head_record import HeadRecord
from fusedhead.report.terminal import Overview, left_first
from fusedhead.version import __version__

HEAD_FIELDS = (
    "fused", "reason", "where", "module", "computes", "tokens", "hidden_size", "vocab_size", "dtype", "device",
    "logits", "engine", "forward_only", "flop", "bytes_logits", "workspace_bytes", "bytes_held", "bytes_saved",
    "materialised",
)  # fmt: skip


def head_data(head: HeadRecord) -> dict[str, Any]:
    """One head: the record's fields, and its run-time counts under "counts"."""
    run, (calls, small) = head.run, head.calls()
    counts = {
        "calls": calls,
        "calls_too_small": small,
        "deferred": run.deferred.value,
        "answered": run.answered.value,
        "passed_on": run.passed.value,
        "built": {str(use): count for use, count in run.built.items() if count},
        "built_at_once": {str(why): count for why, count in run.at_once.items() if count},
    }
    return {**{name: plain_data(getattr(head, name)) for name in HEAD_FIELDS}, "counts": counts}


def plain_data(value: Any) -> Any:
    """A size as a number, or the text of a symbol."""
    return value if value is None or type(value) in (str, int, float, bool) else str(value)


def data(overview: Overview) -> dict[str, Any]:
    """The whole report: ``bytes_saved`` is net and of one step (`terminal.saved_in_a_step`)."""
    heads: Sequence[HeadRecord] = left_first(overview.heads)
    return {
        "fusedhead": __version__,
        "torch": torch.__version__,
        "date": now(),
        "graphs": overview.graphs,
        "seconds_in_the_pass": round(overview.seconds, 4),
        "heads_fused": sum(head.fused for head in heads),
        "heads_left": sum(not head.fused for head in heads),
        "bytes_saved": overview.saved,
        "bytes_built": sum(head.bytes_logits for head in heads if not head.fused),
        "heads": [head_data(head) for head in heads],
        "errors": list(overview.errors),
        "notes": list(overview.notes),
    }


def now() -> str:
    """The current time in UTC, as ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

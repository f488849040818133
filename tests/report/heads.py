"""Records of heads, without a compilation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fusedhead.graph.run_counts import GraphRun, Run
from fusedhead.report.head_record import HeadRecord

ENGINE = "torch windows: gradients in the forward sweep"
FUSED = HeadRecord(
    fused=True, reason="", where="model.py:7 (lm_head)", computes="cross_entropy(mean)", tokens=1024, hidden_size=64,
    vocab_size=32768, logits="never built", engine=ENGINE, bytes_logits=128 << 20, workspace_bytes=25 << 19,
    dtype="float32", device="cpu", source='  File "model.py", line 7\n    z = head(h)', module="lm_head",
)  # fmt: skip
LEFT = replace(
    FUSED, fused=False, reason="the <loss> is odd", computes="", logits="built", engine="", where="model.py:9 (aux)",
    module="aux",
)  # fmt: skip


def head(like: HeadRecord = FUSED, graph: GraphRun | None = None, **changed: Any) -> HeadRecord:
    """A record with counts of its own."""
    return replace(like, run=Run(graph=graph or GraphRun()), **changed)


def heads(count: int) -> list[HeadRecord]:
    """As a model of many heads has them."""
    return [head(module=f"heads.{i}", where=f"model.py:{i + 1} (heads.{i})") for i in range(count)]

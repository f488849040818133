"""Records of heads, without a compilation and of one small program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.graph.run_counts import GraphRun, Run
from fusedhead.report.head_record import HeadRecord
from tests.eager_stack import Rewritten

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


N, D, V = 64, 16, 2048
# torch looks at the gradient of what a compiled function is given
LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def operands(tokens: int = N) -> tuple[Tensor, Tensor, Tensor]:
    h, w = torch.randn(tokens, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return h, w, torch.randint(0, V, (tokens,))


def logits(h: Tensor, w: Tensor) -> Tensor:
    return F.linear(h, w)


def only(rewritten: Rewritten) -> HeadRecord:
    (head,) = rewritten.report.heads
    return head.seen().ended()

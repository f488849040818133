"""Records of heads: what a record holds of a decision, by its fields and not by its text."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor

from fusedhead.report.head_record import HeadRecord
from tests.eager_stack import Rewritten
from tests.programs.claims import D, V, hidden, labels, weight
from tests.test_layers import ROOT


def record(program: Callable[..., Tensor], dynamic: bool = False) -> HeadRecord:
    rewritten = Rewritten(program, dynamic=dynamic)
    rewritten(hidden(6, D), weight(), labels(6))
    (head,) = rewritten.report.heads
    return head


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def log_probabilities(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.linear(h, w).log_softmax(-1).gather(-1, y[:, None]).sum()


def of_their_own_confidence(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """A token program: no statistic gives the probabilities that are gathered."""
    log_p = F.linear(h, w).log_softmax(-1)
    trust = log_p.exp().detach().gather(1, y[:, None])[:, 0]
    return (F.nll_loss(log_p, y, reduction="none") * trust).mean()


@pytest.mark.parametrize(
    ("program", "gathers"), [(loss, False), (log_probabilities, True), (of_their_own_confidence, True)]
)
def test_a_record_says_whether_entries_are_gathered(program: Callable[..., Tensor], gathers: bool) -> None:
    assert record(program).gathers is gathers


def test_a_fused_head_has_its_sizes_and_its_price() -> None:
    head = record(loss)
    assert (head.fused, head.tokens, head.hidden_size, head.vocab_size) == (True, 6, D, V)
    assert (head.bytes_logits, head.flop) == (6 * V * 4, 3 * 2 * 6 * D * V)
    assert (head.dtype, head.device, head.logits) == ("float32", "cpu", "never built")


def test_a_symbolic_number_of_tokens_is_counted_from_the_calls() -> None:
    head = record(loss, dynamic=True)
    assert isinstance(head.tokens, str)
    assert head.seen().bytes_logits == 6 * V * 4


SHOWN = {"computes", "engine", "how"}  # attributes of a record whose text is made for people
READERS = {"startswith", "endswith", "split", "partition", "replace", "removeprefix", "find", "index"}


def test_no_code_reads_text_that_is_made_for_people() -> None:
    for top in ("fusion_pass", "lowering", "kernels"):
        for file in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
                    sides = [node.func.value]
                read = [side for side in sides if isinstance(side, ast.Attribute) and side.attr in SHOWN]
                assert not read, f"{file}:{node.lineno} reads {ast.unparse(node)}"  # type: ignore[attr-defined]

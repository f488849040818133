"""DistributedDataParallel, whose optimizer cuts the graph before the backend sees it, and FSDP, which frees weights.

Both are about the graphs that the backend is given and the gradients that come back, so AOTAutograd runs what the pass
made of them; tests/run/test_program.py has ranks that run Inductor's code.
"""

from __future__ import annotations

from fusedhead.deferred.reasons import BuiltAtOnce
from tests.functional.ranks import on_ranks


def test_a_head_under_ddp_is_fused_and_its_gradients_are_right() -> None:
    assert on_ranks("tests.legality.one_rank:replicated", 1) == [(3, 1)]


def test_what_fsdp_frees_is_not_read_later_where_a_copy_does_not_pay_and_a_loss_in_the_graph_is_fused() -> None:
    (heads,) = on_ranks("tests.legality.one_rank:freed", 1)
    assert heads == [(True, "", [BuiltAtOnce.LARGE_COPY.template]), (True, "", [])]

"""State of deferred logits: what a snapshot notices, and the layouts of the results of recorded calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedhead.deferred.call_program import Leaf, Mode, encode
from fusedhead.deferred.graph_outputs import StaleLogits
from fusedhead.deferred.state import RecordedCall, Same, TensorLayout, as_leaf, differs, snapshot
from tests.deferred.heads import T, V, deferring, is_deferred
from tests.deferred.losses import LOSSES, ROWS
from tests.eager_stack import backend


@pytest.mark.parametrize("compiler", ["pass", "eager", "aot_eager"])
@pytest.mark.parametrize("written", ["weight", "hidden states"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_stale_logits_are_an_error_in_every_compiled_function(compiler: str, written: str) -> None:
    """At the call that compiles, and at those that find the graph."""
    run = deferring(lambda h, w: h @ w.T)
    with_pass = backend(lambda report: None)
    loss = torch.compile(LOSSES["cross_entropy"], backend=with_pass if compiler == "pass" else compiler)
    for stale in (True, True, False, True, False):
        h, w = torch.randn(ROWS, T, 8), torch.randn(V, 8)
        z, expected = run(h, w), LOSSES["cross_entropy"](h @ w.T)
        assert is_deferred(z)
        if stale:
            (w if written == "weight" else h).mul_(0.5)
            with pytest.raises(StaleLogits, match="changed in place"):
                loss(z)
        else:
            torch.testing.assert_close(loss(z), expected)


def test_a_snapshot_is_of_the_tensor_until_it_is_written_or_given_other_memory() -> None:
    w = torch.randn(3, 4)
    before = snapshot(w)
    assert snapshot(w).is_of(before)
    assert not snapshot(w.clone()).is_of(before)
    w.add_(1)
    assert not snapshot(w).is_of(before)
    before = snapshot(w)
    w.data = torch.zeros(3, 4)
    assert not snapshot(w).is_of(before)


def test_an_operand_keeps_the_history_that_it_had_and_the_memory_that_it_shares() -> None:
    w = torch.randn(3, 4, requires_grad=True)
    leaf, before = as_leaf(w, "the weight", Mode(True, None))
    plain, _ = as_leaf(w, "the weight", Mode(False, None))
    w.requires_grad_(False)
    assert (leaf.requires_grad, plain.requires_grad) == (True, False)
    assert leaf.data_ptr() == plain.data_ptr() == w.data_ptr()
    assert not differs(leaf, before)
    w.data.mul_(2)  # without a version
    assert differs(leaf, before)


def call(func: Any, tensor: Tensor, *args: Any, mode: Mode = Mode(True, None)) -> RecordedCall:  # noqa: B008
    code = encode((tensor, *args), lambda _: Leaf(0))
    return RecordedCall(func, code, encode({}, lambda _: Leaf(0)), (tensor,), mode)


def test_the_layout_of_a_result_is_found_without_computing_it() -> None:
    z = torch.randn(4, 6, requires_grad=True)
    (layout,), many = call(Tensor.narrow, z, 1, 2, 3).layouts()
    expected = z.narrow(1, 2, 3)
    assert (layout, many) == (TensorLayout.of(expected), None)
    assert (layout.offset, layout.grad) == (2, True)
    layouts, many = call(Tensor.split, z, 2).layouts()
    assert (len(layouts), many) == (2, tuple)
    (layout,), _ = call(Tensor.exp, z, mode=Mode(False, None)).layouts()
    assert not layout.grad


def test_a_call_that_hands_its_tensor_back_says_which() -> None:
    assert call(Tensor.float, torch.randn(4, 6)).layouts() == ([], Same(0))


def test_a_recorded_call_runs_once_in_the_modes_it_was_made_in() -> None:
    z = torch.randn(4, 6, requires_grad=True)
    recorded = call(Tensor.exp, z, mode=Mode(False, None))
    result = recorded.evaluate(lambda tensor: tensor)
    assert not result.requires_grad
    assert recorded.evaluate(lambda tensor: tensor) is result

"""Writes between projection and loss that do not look like writes: packets, bodies, buffers, arrays, opaque functions.

What a node writes comes from what it does. Each program's right value is eager code's, and the head that reads what
was overwritten stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.mutations.unseen import (
    OPS,
    WRITES,
    D,
    N,
    V,
    Writes,
    WritesInBackward,
    WritesToItsGradient,
    labels,
    taken_whole_and_pure,
    taken_whole_with_a_backward,
)
from tests.programs.claims import compiled, left, right


@pytest.mark.parametrize("spelling", WRITES)
def test_hidden_states_that_are_written_are_read_before(spelling: str) -> None:
    def program(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1.0
        z = h @ w.T
        WRITES[spelling](h)
        return F.cross_entropy(z, y), h

    with torch.no_grad():
        left(program, torch.randn(N, D), torch.randn(V, D), labels(), because="before the loss")


@pytest.mark.parametrize("spelling", ["packet", "detached", "checkpoint", "taken whole", "out"])
def test_a_frozen_head_is_trained_through_what_was_read(spelling: str) -> None:
    """Eager code with a frozen head does not keep the hidden states, so that they may be overwritten."""

    def program(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        h = x * 2.0
        z = F.linear(h, w)
        WRITES[spelling](h.detach())
        return F.cross_entropy(z, y)

    left(program, torch.randn(N, D, requires_grad=True), torch.randn(V, D), labels(), because="")


FUNCTIONS = {
    "in the forward": (left, Writes.apply),
    "in the backward": (left, WritesInBackward.apply),
    "in the backward, taken whole": (left, taken_whole_with_a_backward),
    "to its own gradient": (right, WritesToItsGradient.apply),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("spelling", FUNCTIONS)
@pytest.mark.parametrize("early", [True, False])
def test_an_autograd_function_that_writes_to_the_hidden_states_of_a_frozen_head(spelling: str, early: bool) -> None:
    claim, function = FUNCTIONS[spelling]

    def program(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        h = x * 2.0
        side = function(x, h.detach()) if early else 0.0
        z = F.linear(h, w)
        side = side if early else function(x, h.detach())
        return F.cross_entropy(z, y) + 0.1 * side.sum()

    inputs = torch.randn(N, D, requires_grad=True), torch.randn(V, D), labels()
    if spelling == "in the forward" and early:
        claim = right  # the head reads what was written
    claim(program, *inputs, **({"because": " in place"} if claim is left else {}))


def test_a_frozen_head_whose_hidden_states_are_overwritten_after_the_loss_stays() -> None:
    def program(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        h = x * 2.0
        loss = F.cross_entropy(F.linear(h, w), y)
        OPS.bump(h.detach())
        return loss

    left(program, torch.randn(N, D, requires_grad=True), torch.randn(V, D), labels(), because="bump at")


@torch.compiler.nested_compile_region
def loss_of(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def test_a_region_whose_operands_are_overwritten_behind_it_keeps_its_head() -> None:
    """Of a region that is compiled once: eager code itself refuses a checkpoint whose operands were overwritten."""

    def program(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        h = x * 2.0
        loss = loss_of(h, w, y)
        if writes:
            h.detach().add_(1.0)
        return loss

    inputs = torch.randn(N, D, requires_grad=True), torch.randn(V, D), labels()
    writes = False
    right(program, *inputs)
    writes = True
    left(program, *inputs, because="add_ at")


def test_returned_logits_whose_hidden_states_are_overwritten_stay() -> None:
    def program(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 2.0
        z = F.linear(h, w)
        loss = F.cross_entropy(z, y)
        OPS.bump(h.detach())
        return loss, z

    left(program, torch.randn(N, D, requires_grad=True), torch.randn(V, D), labels(), because="bump at")


OPERANDS = ("weight", "bias", "labels", "vector", "mask", "class weights")


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("spelling", ["packet", "list", "view", "dunder"])
def test_every_operand_may_be_the_one_that_is_written(operand: str, spelling: str) -> None:
    write = {
        "packet": lambda x: torch.ops.aten.fill_(x, 1),
        "list": lambda x: torch._foreach_zero_([torch.ones(1, dtype=x.dtype), x]),
        "view": lambda x: x.view(-1)[:2].fill_(1),
        "dunder": lambda x: x.__iadd__(x.new_ones(())) if x.dtype != torch.bool else x.__ixor__(x),
    }[spelling]

    def program(h: Tensor, *inputs: Tensor) -> Tensor:
        weight, bias, labels, vector, mask, classes = inputs
        z = (F.linear(h, weight, bias) * vector).masked_fill(mask, -3.0)
        first = F.cross_entropy(z, labels, weight=classes)
        write(inputs[OPERANDS.index(operand)])
        return first + F.cross_entropy(z, labels, weight=classes, reduction="sum")

    numbers = torch.randn(V, D), torch.randn(V), torch.randint(0, V - 1, (N,)), torch.rand(V)
    with torch.no_grad():
        compiled(program, [torch.randn(N, D), *numbers, torch.rand(V) > 0.7, torch.rand(V)])


def test_a_training_batch_norm_changes_its_statistics() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, b: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w, b)
        other = F.batch_norm(x, b, v, training=training, momentum=0.5)
        return F.cross_entropy(z, y), other.sum()

    for training, claim in ((True, left), (False, right)):
        inputs = torch.randn(V), torch.rand(V), torch.randn(N, V)
        with torch.no_grad():
            kwargs = {"because": "batch_norm at"} if training else {}
            claim(program, torch.randn(N, D), torch.randn(V, D), labels(), *inputs, **kwargs)


@pytest.mark.parametrize("spelling", ["function", "method", "aten", "packet"])
def test_other_norms_that_keep_statistics_change_them(spelling: str) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, b: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w, b)
        flags = (True, 0.5, 1e-5)
        other = {
            "function": lambda: F.instance_norm(x, b, v, use_input_stats=True),
            "method": lambda: torch.instance_norm(x, None, None, b, v, *flags, False),
            "aten": lambda: torch.ops.aten.native_batch_norm.default(x, None, None, b, v, *flags)[0],
            "packet": lambda: torch.ops.aten.batch_norm(x, None, None, b, v, *flags, False),
        }[spelling]()
        return F.cross_entropy(z, y), other.sum()

    inputs = torch.randn(V), torch.rand(V), torch.randn(2, V, 3)
    with torch.no_grad():
        left(program, torch.randn(N, D), torch.randn(V, D), labels(), *inputs, because="_norm at")


READS: dict[str, Callable[[Tensor], Any]] = {
    "and": lambda x: (x > 0) & (x < 1),
    "or": lambda x: (x > 0) | (x < 1),
    "xor": lambda x: (x > 0) ^ (x < 1),
    "not": lambda x: ~(x > 0),
    "dunder": lambda x: (x > 0).__or__(x < 1),
    "packet": lambda x: OPS.pure(x),
    "overload": lambda x: OPS.pure.default(x),
    "checkpoint": lambda x: checkpoint(lambda a: (a * 2).sum(), x, use_reentrant=False),
    "cond": lambda x: torch.cond(torch.ones(()) > 0, lambda a: (a * 2).sum(), lambda a: a.sum(), (x,)),
    "taken whole": lambda x: taken_whole_and_pure(x),
    "numpy": lambda x: x.numpy() + 1,
    "hook": lambda x: x.requires_grad and x.register_hook(lambda g: g.mul_(1)),
    "requires grad": lambda x: x.requires_grad_(x.requires_grad),
    "draws": lambda x: F.dropout(x, 0.5),
    "writes to its own": lambda x: x.clone().add_(1),
    "list": lambda x: torch._foreach_add([x, x], 1.0),
    "norm": lambda x: F.layer_norm(x, (D,)),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("spelling", READS)
@pytest.mark.parametrize("grad", [True, False])
def test_what_only_reads_is_in_nobodys_way(spelling: str, grad: bool) -> None:
    def program(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        h = x * 1.0
        z = h @ w.T
        READS[spelling](h.detach() if spelling == "numpy" else h)
        return F.cross_entropy(z, y)

    inputs = torch.randn(N, D), torch.randn(V, D), labels()
    if grad:
        inputs = inputs[0].requires_grad_(), torch.nn.Parameter(inputs[1]), inputs[2]
    with torch.set_grad_enabled(grad):
        if spelling == "hook" and grad:  # from torch 2.15 on Dynamo ends the graph at a hook on hidden states
            compiled(program, inputs)
        else:
            right(program, *inputs)


@pytest.mark.parametrize("spelling", ["logical", "bitwise", "operator"])
def test_masks_joined_by_and_and_or_leave_the_gradients_in_the_forward(spelling: str) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, old: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        lp = -F.cross_entropy(h @ w.T, y, reduction="none")
        loss = (lp * advantage).mean()
        low, high = lp.detach() - old < -0.2, lp.detach() - old > 0.2
        wins, loses = advantage > 0, advantage < 0
        hit = {
            "logical": lambda: torch.logical_or(torch.logical_and(low, loses), torch.logical_and(high, wins)),
            "bitwise": lambda: torch.bitwise_or(torch.bitwise_and(low, loses), torch.bitwise_and(high, wins)),
            "operator": lambda: (low & loses) | (high & wins),
        }[spelling]()
        return loss, hit.float().mean()

    h, w = torch.randn(N, D, requires_grad=True), torch.nn.Parameter(torch.randn(V, D))
    report = right(program, h, w, labels(), torch.randn(N) - 8, torch.randn(N))
    assert "in the forward" in report.heads[0].engine


def test_a_mask_of_classes_joined_by_and_is_read() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.T).masked_fill(a & b | (a ^ b), -1e4), y)

    h, w = torch.randn(N, D, requires_grad=True), torch.nn.Parameter(torch.randn(V, D))
    right(program, h, w, labels(), torch.rand(V) > 0.8, torch.rand(V) > 0.5)

"""Heads inside regions that are compiled once (``nested_compile_region``), whole or in part, called once or more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import checkpoint

from fusedhead.canonicalize import inline_regions
from tests.programs.claims import D, V, hidden, labels, left, right, weight

once = torch.compiler.nested_compile_region
# PyTorch cannot run a region eagerly and differentiate it, so the rewritten graph is handed to AOTAutograd.
AOT = {"compiler": lookup_backend("aot_eager")}


@once
def head(h: Tensor, w: Tensor) -> Tensor:
    return F.linear(h.tanh(), w)


@once
def loss_of(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), y)


@once
def head_and_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


@once
def head_and_loss_and_logits(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(h, w)
    return F.cross_entropy(z, y), z


@once
def region_of_regions(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return loss_of(head(h, w), y) * 2


@once
def to_probabilities(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), F.one_hot(y, V).to(h.dtype))


def layers(h: Tensor, a: Tensor) -> Tensor:
    for _ in range(20):  # more nodes than are repeated for the sake of a shared sweep
        h = torch.tanh(h @ a) + h
    return h


@once
def model_with_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    a = torch.eye(D) * 0.1
    return F.log_softmax(F.linear(layers(h, a), w), -1).gather(1, y[:, None])[:, 0]


@once
def model(h: Tensor, w: Tensor) -> Tensor:
    return F.linear(layers(h, torch.eye(D) * 0.1), w)


Program = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TWICE: dict[str, Program] = {
    "head": lambda h, w, v, y: F.cross_entropy(head(h, w), y) + F.cross_entropy(head(h * 0.3, v), y),
    "loss": lambda h, w, v, y: loss_of(F.linear(h, w), y) + loss_of(F.linear(h * 0.3, v), y),
    "head and loss apart": lambda h, w, v, y: loss_of(head(h, w), y) + loss_of(head(h * 0.3, v), y),
    "head and loss": lambda h, w, v, y: head_and_loss(h, w, y) + head_and_loss(h * 0.3, v, y),
    "region of regions": lambda h, w, v, y: region_of_regions(h, w, y) + region_of_regions(h * 0.3, v, y),
    "targets that are probabilities": lambda h, w, v, y: to_probabilities(h, w, y) + to_probabilities(h * 0.3, v, y),
    "a whole model without loss": lambda h, w, v, y: F.cross_entropy(model(h, w), y) + loss_of(model(h * 0.3, v), y),
}  # fmt: skip


@pytest.mark.parametrize("program", TWICE.values(), ids=TWICE)
def test_a_region_that_is_called_twice_is_fused_at_both(program: Program) -> None:
    right(program, hidden(6, D), weight(), weight(), labels(6), fused=2, options=AOT)


@pytest.mark.parametrize("program", [head_and_loss, region_of_regions])
def test_a_region_that_is_called_once_is_one_head(program: Callable[..., Tensor]) -> None:
    right(program, hidden(6, D), weight(), labels(6), options=AOT)


def test_a_large_region_is_rewritten_once_for_all_its_calls() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.logsigmoid(model_with_loss(h, w, y) - model_with_loss(h * 0.3, w, y)).mean()

    report = right(program, hidden(6, D), weight(), labels(6), options=AOT)
    assert report.after.count("torch.ops.fusedhead.head_stats") == 1
    assert report.after.count("invoke_subgraph(") == 2


def test_a_reference_model_under_no_grad_takes_no_gradient() -> None:
    def program(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
        policy = model_with_loss(h, w, y)
        with torch.no_grad():  # the other way round PyTorch 2.13 loses the gradient of both
            reference = model_with_loss(h, v, y)
        return F.logsigmoid(policy - reference).mean()

    report = right(program, hidden(6, D), weight(), weight(), labels(6), options=AOT)
    assert "without recording gradients too" in report.heads[0].engine


def test_logits_that_leave_a_region_are_returned_as_any_others() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (first, z), (second, _) = head_and_loss_and_logits(h, w, y), head_and_loss_and_logits(h * 0.3, w, y)
        return first, second, z

    for logits in ("eager", "deferred"):
        right(program, hidden(6, D), weight(), labels(6), fused=2, options={**AOT, "fusedhead.logits": logits})


def test_token_counts_of_a_region_may_be_symbols() -> None:
    w = weight()

    def program(h: Tensor, y: Tensor) -> Tensor:
        return head_and_loss(h, w, y) + head_and_loss(h[1:] * 2, w, y[1:])

    right(program, hidden(6, D), labels(6), fused=2, dynamic=True, options=AOT)


def test_a_region_of_layers_stays_a_region() -> None:
    @once
    def layer(h: Tensor, a: Tensor) -> Tensor:
        return torch.tanh(h @ a)

    def program(h: Tensor, a: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(layer(layer(h, a), a), w), y)

    report = right(program, hidden(6, D), weight(D, D), weight(), labels(6), options=AOT)
    assert report.after.count("invoke_subgraph(") == 2


def test_a_region_may_hold_a_checkpoint_and_a_checkpoint_a_region() -> None:
    @once
    def recomputed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return checkpoint(lambda h, w: F.cross_entropy(F.linear(h, w), y), h, w, use_reentrant=False)

    def inside(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return recomputed(h, w, y) + recomputed(h * 0.3, w, y)

    def outside(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        body = lambda h, w: head_and_loss(h, w, y) + head_and_loss(h * 0.3, w, y)  # noqa: E731
        return checkpoint(body, h, w, use_reentrant=False)

    right(inside, hidden(6, D), weight(), labels(6), options=AOT)
    right(outside, hidden(6, D), weight(), labels(6), options=AOT)


@pytest.mark.parametrize("times", [1, 2])
def test_a_head_and_its_loss_may_be_regions_of_a_body(times: int) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        body = lambda h, w: loss_of(head(h, w), y)  # noqa: E731
        return sum(checkpoint(body, h * (k + 1), w, use_reentrant=False) for k in range(times))  # type: ignore[return-value]

    right(program, hidden(6, D), weight(), labels(6), fused=times, options=AOT)


def test_what_a_region_cannot_have_fused_it_keeps() -> None:
    @once
    def mixing(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).cumsum(0), y)

    left(
        lambda h, w, y: mixing(h, w, y) + mixing(h * 0.3, w, y), hidden(6, D), weight(), labels(6),
        because="runs over tokens", options=AOT,
    )  # fmt: skip


def test_a_region_that_cannot_be_repeated_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: object) -> None:
        raise inline_regions.Differs

    monkeypatch.setattr(inline_regions, "value_on_operands", differs)
    left(TWICE["head"], hidden(6, D), weight(), weight(), labels(6), because="cannot be repeated", options=AOT)

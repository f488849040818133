"""Traps of rounding, dtypes and what may be computed early.

Where the pass reads the program it is right; where it does not, it leaves the head and says why.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.fuzz.compare import compare
from tests.fuzz.program import Case
from tests.programs.claims import B, D, T, V, hidden, labels, right, weight

SIZES = {"B": 2, "T": 6, "D": 8, "V": 33}
INPUTS = {
    "h": "torch.randn(B * T, D).to(dtype).requires_grad_()",
    "w": "(torch.randn(V, D) * 0.6).to(dtype).requires_grad_()",
    "y": "torch.randint(0, V, (B * T,))",
}


def within_the_error_of_eager_code(*body: str, returns: tuple[str, ...] = ("l",), **options: object) -> None:
    """A fused program whose error against float64 is no larger than eager code's in the same dtype."""
    inputs = {**INPUTS, **options.pop("inputs", {})}  # type: ignore[dict-item]
    verdict = compare(Case(SIZES, inputs, body, returns, **{"dtype": "bfloat16", **options}))  # type: ignore[arg-type]
    assert not verdict.kind, f"{verdict.kind}: {verdict.detail}"
    assert any(head.fused for head in verdict.report.heads), str(verdict.report)


@pytest.mark.parametrize(
    "loss",
    [
        "F.cross_entropy(z, y)", "F.cross_entropy(z.float(), y)", "-z.log_softmax(-1).gather(1, y[:, None]).mean()",
        "-F.log_softmax(z, -1, dtype=torch.float32).gather(1, y[:, None]).mean()",
        "z.logsumexp(-1).float().pow(2).mean()",
        "F.nll_loss(F.log_softmax(z, -1), y, reduction='sum')",
    ],
)  # fmt: skip
def test_low_precision_results_have_eager_dtypes_and_no_larger_errors(loss: str) -> None:
    within_the_error_of_eager_code("z = F.linear(h, w)", f"l = {loss}")


@pytest.mark.parametrize(
    "order",
    ["(30 * torch.tanh(z / 30)).float()", "30 * torch.tanh(z.float() / 30)", "23 * torch.sigmoid((z + 5) / 7.5)"],
)
def test_a_cap_before_or_after_the_cast_is_within_eager_errors(order: str) -> None:
    within_the_error_of_eager_code("z = F.linear(h, w)", f"l = F.cross_entropy({order}, y)")


def test_a_float32_head_on_low_precision_operands_is_computed_in_float32() -> None:
    within_the_error_of_eager_code("z = h.float() @ w.float().t()", "l = F.cross_entropy(z, y)")


def test_argmax_is_that_of_the_rounded_logits() -> None:
    within_the_error_of_eager_code(
        "z = F.linear(h, w)",
        "l = F.cross_entropy(z, y)",
        "hit = z.argmax(-1)",
        returns=("l", "hit"),
        decisions=frozenset({"hit"}),
    )


def test_ties_go_to_the_first_class() -> None:
    w = torch.zeros(V, D)
    w[3] = w[7] = 1.0

    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return F.cross_entropy(z, y), z.argmax(-1)

    right(program, torch.rand(6, D), w, labels(6))


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_around_or_inside_has_eager_dtypes(inside: bool) -> None:
    from tests.fuzz.program import Block

    body = ("z = F.linear(h, w)", "l = F.cross_entropy(z, y)")
    region = Block('with torch.autocast("cpu", torch.bfloat16):', body)
    case = Case(SIZES, INPUTS, (region,) if inside else body, ("l",), ambient_autocast=not inside)
    verdict = compare(case)
    assert not verdict.kind, f"{verdict.kind}: {verdict.detail}"
    assert [head.fused for head in verdict.report.heads] == [True]


def test_a_loss_outside_the_autocast_region_is_right() -> None:
    from tests.fuzz.program import Block

    region = Block('with torch.autocast("cpu", torch.bfloat16):', ("z = F.linear(h, w)",))
    case = Case(SIZES, INPUTS, (region, "l = F.cross_entropy(z.float(), y)"), ("l",))
    verdict = compare(case)
    assert not verdict.kind, f"{verdict.kind}: {verdict.detail}"


def test_half_precision_takes_no_gradient_of_a_transform_before_the_loss_scale_is_known() -> None:
    """Plain logits have a bound of their gradients, which keeps these in range (`tests/rewrite/test_loss_scale.py`)."""

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w) * 3, y)

    rewritten = Rewritten(program)
    rewritten(
        torch.randn(6, D, dtype=torch.float16, requires_grad=True), weight().detach().half().requires_grad_(), labels(6)
    )
    assert "underflow" in rewritten.report.heads[0].engine


@pytest.mark.parametrize(
    "tail",
    [
        lambda x: ((-x).exp().detach() * x).mean(), lambda x: -F.logsigmoid(x).sum(), lambda x: x.pow(2).mean(),
        lambda x: (x - x.detach()).exp().mean(), lambda x: x.max(), lambda x: torch.minimum(x, x.clamp(max=2)).sum(),
        lambda x: x.std(), lambda x: (x / x.sum().detach()).sum(), lambda x: x.softmax(0)[0],
    ],
)  # fmt: skip
def test_a_loss_that_is_not_linear_in_the_token_losses_is_recomputed(tail) -> None:  # type: ignore[no-untyped-def]
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return tail(F.cross_entropy(F.linear(h, w), y, reduction="none"))

    report = right(program, hidden(6, D), weight(), labels(6))
    assert "recompute" in report.heads[0].engine


def test_a_function_of_a_sum_of_token_losses_needs_no_second_sweep() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return -F.logsigmoid(F.cross_entropy(F.linear(h, w), y, reduction="sum"))

    report = right(program, hidden(6, D), weight(), labels(6))
    assert "recompute" not in report.heads[0].engine


def test_any_upstream_gradient_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(F.linear(h, w), y)
        return loss * scale, loss.detach()

    right(program, hidden(6, D), weight(), labels(6), torch.tensor(-3.0))


def test_an_upstream_gradient_a_token_is_right() -> None:
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w), y, reduction="none"), hidden(6, D), weight(), labels(6))


def test_the_z_loss_is_that_of_the_node_it_reads() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        capped = 2 * torch.tanh(z / 2)
        return (
            F.cross_entropy(capped / 0.7, y)
            + 0.1 * z.logsumexp(-1).pow(2).mean()
            + 0.1 * capped.logsumexp(-1).square().sum()
        )

    right(program, hidden(6, D), weight(), labels(6))


def test_learned_scales_get_their_gradients() -> None:
    def program(h: Tensor, w: Tensor, s: Tensor, per_class: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy((F.linear(h, w, bias) * s.exp()) * per_class, y)

    right(program, hidden(6, D), weight(), torch.tensor(0.3, requires_grad=True), weight(V), weight(V), labels(6))


def test_a_temperature_a_token_gets_its_gradient() -> None:
    def program(h: Tensor, w: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy((F.linear(h, w) / (t.exp() + 1)).view(-1, V), y.view(-1))

    right(program, hidden(), weight(), hidden(B, T, 1), labels())


def test_a_bias_that_broadcasts_over_the_classes_is_no_bias_of_the_loss_but_of_the_z_loss() -> None:
    def program(h: Tensor, w: Tensor, t: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w) + t
        return F.cross_entropy(z, y) + z.logsumexp(-1).pow(2).mean()

    right(program, hidden(6, D), weight(), hidden(6, 1), labels(6))


def test_deterministic_algorithms_are_allowed() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        right(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), hidden(6, D), weight(), labels(6))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
def test_logits_of_any_size_are_right(size: float) -> None:
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w) * size, y), hidden(6, D), weight(), labels(6))


def test_missing_logits_are_missing_losses() -> None:
    h = torch.randn(6, D)
    h[1, 0] = torch.nan
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w), y, reduction="none"), h, weight().detach(), labels(6))


def test_infinite_logits_are_losses_that_are_not_finite() -> None:
    h = torch.randn(6, D)
    h[0, 0] = torch.inf
    losses = Rewritten(lambda h, w, y: F.cross_entropy(F.linear(h, w), y, reduction="none"))(
        h, weight().detach(), labels(6)
    )
    assert losses.isfinite().tolist() == [False, True, True, True, True, True]


def test_a_policy_and_its_reference_of_the_same_weights_agree_to_the_last_bit() -> None:
    """The ratio that policy gradients begin with is one, though one sweep has gradients and the other has none."""

    def log_probs(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.linear(h, w).log_softmax(-1).gather(1, y[:, None])

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            reference = log_probs(h, w, y)
        return log_probs(h, w, y) - reference

    for dtype in (torch.float32, torch.bfloat16):
        h, w = (x.detach().to(dtype).requires_grad_() for x in (torch.randn(6, 64), torch.randn(300, 64)))
        rewritten = Rewritten(program)
        assert rewritten(h, w, labels(6)).count_nonzero() == 0
        assert [head.fused for head in rewritten.report.heads] == [True, True]


def test_a_head_in_float32_within_autocast_stays_in_float32() -> None:
    def both_off(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = h * 2
            with torch.autocast("cpu", enabled=False):
                return F.cross_entropy(F.linear(x.float(), w.float()), y)

    def head_off(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                z = F.linear(h, w)
            return F.cross_entropy(z, y)

    for program in (both_off, head_off):
        right(program, hidden(6, D), weight(), labels(6))


@pytest.mark.parametrize("option", ["eager", "deferred"])
def test_logits_returned_from_an_autocast_region_are_those_of_eager_code(option: str) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            z = F.linear(h, w)
            return F.cross_entropy(z, y), z * 2

    inputs = hidden(6, D), weight(), labels(6)
    rewritten = Rewritten(program, {"fusedhead.logits": option})
    got, expected = rewritten(*inputs)[1] + 0, program(*inputs)[1]
    assert got.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    assert [head.fused for head in rewritten.report.heads] == [True]

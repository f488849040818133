"""What is made of logits token by token, in the forms the world writes: fused, and the numbers are eager's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.eager_stack import Rewritten
from tests.programs.claims import B, D, T, V, hidden, labels, right, weight
from tests.rewrite.divergences import Program, calls, distillation, reverse_kl, top_k_accuracy


def jensen_shannon(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(ht, wt).log_softmax(-1)
    student = F.linear(h, w).log_softmax(-1)
    middle = torch.logsumexp(torch.stack([teacher, student]), 0) - 0.6931
    return F.kl_div(middle, teacher, reduction="sum", log_target=True) + F.kl_div(
        middle, student, reduction="sum", log_target=True
    )


def total_variation(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(ht, wt).softmax(-1)
    return 0.5 * (F.log_softmax(F.linear(h, w), -1).exp() - teacher).abs().sum(-1).mean()


@pytest.mark.parametrize("program", [distillation, reverse_kl, jensen_shannon, total_variation])
def test_a_divergence_between_two_heads_builds_neither_ones_logits(program: Program) -> None:
    right(program, hidden(), weight(), hidden().detach(), weight().detach(), fused=2)


def test_a_detached_head_gets_no_gradient_also_where_a_second_result_is_made_of_it() -> None:
    def program(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = F.linear(h, w), F.linear(ht, wt).detach()
        divergence = (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1).mean()
        return divergence, teacher.max(-1).values

    operands = [hidden(), weight(), hidden(), weight()]
    rewritten = Rewritten(program)
    rewritten(*operands)[0].backward()
    assert [x.grad is None for x in operands] == [False, False, True, True]
    assert len([head for head in rewritten.report.heads if head.fused]) == 2


def test_a_learned_temperature_gets_its_gradient() -> None:
    def program(h: Tensor, w: Tensor, t: Tensor, q: Tensor) -> Tensor:
        return -(q * (F.linear(h, w) / t).exp().log1p().log_softmax(-1)).sum()

    right(program, hidden(), weight(), torch.tensor(1.3, requires_grad=True), torch.rand(B, T, V))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities_as_targets(reduction: str, smoothing: float) -> None:
    def program(h: Tensor, w: Tensor, q: Tensor) -> Tensor:
        z = F.linear(h, w).view(-1, V)
        return F.cross_entropy(z, q.view(-1, V), reduction=reduction, label_smoothing=smoothing)

    right(program, hidden(), weight(), torch.rand(B, T, V).softmax(-1))


def test_targets_that_want_a_gradient_get_it() -> None:
    def program(h: Tensor, w: Tensor, q: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), q)

    right(program, hidden(6, D), weight(), torch.rand(6, V, requires_grad=True))


def smoothed_by_hand(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    lp = F.linear(h, w).view(-1, V).log_softmax(-1)
    target = torch.zeros_like(lp).fill_(0.1 / (V - 1)).scatter_(1, y.view(-1, 1), 0.9)
    return (-target * lp).sum(-1).mean()


def one_hot(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    lp = F.linear(h, w).view(-1, V).log_softmax(-1)
    return -(F.one_hot(y.view(-1), V).float() * lp).sum() / lp.shape[0]


def focal(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    lp = F.linear(h, w).view(-1, V).log_softmax(-1)
    return F.nll_loss((1 - lp.exp()) ** 2 * lp, y.view(-1))


def own_confidence(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    lp = F.linear(h, w).view(-1, V).log_softmax(-1)
    trust = lp.exp().detach().gather(1, y.view(-1, 1))[:, 0]
    return (F.nll_loss(lp, y.view(-1), reduction="none") * trust).mean()


def by_definition(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w).view(-1, V)
    e = (z - z.amax(-1, keepdim=True).detach()).exp()
    p = (e / e.sum(-1, keepdim=True)).gather(1, y.view(-1, 1))
    return -(p + 1e-9).log().mean() + 0 * z.logsumexp(-1).sum()


def squared_confidence(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w).view(-1, V)
    return F.cross_entropy(z, y.view(-1)) + (z.softmax(-1) ** 2).sum(-1).mean()


def odd_activation(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.softplus(F.linear(h, w)) + 0.1 * F.linear(h, w).sin()
    return F.cross_entropy(z.view(-1, V), y.view(-1))


@pytest.mark.parametrize(
    "program",
    [
        smoothed_by_hand, one_hot, focal, own_confidence, by_definition, squared_confidence, top_k_accuracy,
    ],
)  # fmt: skip
def test_losses_that_no_statistic_gives(program: Program) -> None:
    right(program, hidden(), weight(), labels())


def test_two_projections_that_meet_are_fused_together() -> None:
    right(odd_activation, hidden(), weight(), labels(), fused=2)


@pytest.mark.parametrize("value", [-float("inf"), -1e9, 0.0])
def test_classes_that_are_masked_cost_no_row_program(value: float) -> None:
    def filled(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w).masked_fill(torch.arange(V) >= 9, value)
        return F.cross_entropy(z.view(-1, V), y.view(-1))

    def selected(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = torch.where(torch.arange(V) < 9, F.linear(h, w), value)
        return F.cross_entropy(z.view(-1, V), y.view(-1))

    def assigned(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        z[..., 9:] = value
        z[:, :, 0] = 2.0
        return F.cross_entropy(z.view(-1, V), y.view(-1))

    for program in (filled, selected, assigned):
        report = right(program, hidden(), weight(), labels(high=9))
        assert report.heads[0].computes == "cross_entropy(mean, ignore_index=-100)"


def test_the_class_dimension_may_stand_anywhere() -> None:
    def program(h: Tensor, w: Tensor, q: Tensor) -> Tensor:
        lp = F.linear(h, w).transpose(1, 2).log_softmax(1)
        return F.kl_div(lp, q.transpose(1, 2), reduction="none").sum(1).mean()

    right(program, hidden(), weight(), torch.rand(B, T, V).softmax(-1))


def test_ambient_autocast_rounds_where_it_rounds_in_eager_code() -> None:
    h, w, ht, wt = hidden(), weight(), hidden().detach(), weight().detach()
    rewritten = Rewritten(distillation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = rewritten(h, w, ht, wt), distillation(h, w, ht, wt)
    assert sum(head.fused for head in rewritten.report.heads) == 2
    torch.testing.assert_close(got, expected, rtol=8e-3, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got, [h, w]), torch.autograd.grad(expected, [h, w]), rtol=1e-2, atol=1e-5
    )


def test_token_counts_may_be_symbols() -> None:
    w, wt = weight(), weight().requires_grad_(False)  # parameters: their sizes are no symbols
    rewritten = Rewritten(distillation, dynamic=True)
    for tokens in (5, 7, 3):
        h, ht = hidden(B, tokens, D), torch.randn(B, tokens, D)
        torch.testing.assert_close(rewritten(h, w, ht, wt), distillation(h, w, ht, wt))
    assert rewritten.report.graphs == 1
    assert sum(head.fused for head in rewritten.report.heads) == 2


def test_a_few_classes_are_weighed_against_each_other() -> None:
    def program(h: Tensor, w: Tensor, classes: Tensor) -> Tensor:
        z = F.linear(h, w)
        yes_or_no = F.log_softmax(z[:, -1, [3, 7]], -1)[:, 0]
        return yes_or_no.sum() + F.cross_entropy(z.index_select(-1, classes)[:, 0], z[:, 0].argmax(-1) % 2)

    right(program, hidden(), weight(), torch.tensor([5, V - 1]))


def test_a_class_past_the_end_is_an_error() -> None:
    def program(h: Tensor, w: Tensor) -> Tensor:
        return F.log_softmax(F.linear(h, w).sinh()[..., [0, -V - 1]], -1).sum()

    with pytest.raises((IndexError, RuntimeError)):
        right(program, hidden(), weight())


def test_a_transposed_weight_gets_its_gradient_in_one_layout() -> None:
    def program(h: Tensor, wt: Tensor, q: Tensor) -> Tensor:
        return F.cross_entropy(h @ wt, q)

    inputs = hidden(6, D), weight(D, V), torch.rand(6, V)
    expected = torch.autograd.grad(program(*inputs), inputs[:2])
    got = torch.autograd.grad(torch.compile(program, backend="fusedhead")(*inputs), inputs[:2])
    torch.testing.assert_close(got, expected)


def test_logits_beside_it_are_deferred() -> None:
    def program(h: Tensor, w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return F.cross_entropy(z.view(-1, V), q.view(-1, V)), z

    right(program, hidden(), weight(), torch.rand(B, T, V))


@pytest.mark.parametrize("program", [distillation, jensen_shannon])
def test_a_checkpointed_divergence_is_computed_again_in_the_backward(program: Program) -> None:
    def recomputed(*operands: Tensor) -> object:
        return checkpoint(program, *operands, use_reentrant=False)

    right(recomputed, hidden(), weight(), hidden().detach(), weight().detach(), fused=2)


def test_a_checkpointed_region_may_return_what_was_made_of_every_token() -> None:
    def body(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        lp = F.linear(h, w).log_softmax(-1)
        return F.nll_loss((1 - lp.exp()) ** 2 * lp, y, reduction="none"), lp.topk(2, -1).values.sum(-1)

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        losses, best = checkpoint(body, h, w, y, use_reentrant=False)
        return losses.mean() + best.square().mean()

    right(program, hidden(6, D), weight(), labels(6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_best_classes_of_a_low_precision_with_bias_are_eagers(dtype: torch.dtype) -> None:
    def program(h: Tensor, w: Tensor, b: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w, b)
        return F.cross_entropy(z, q), z.detach().topk(3, -1).indices

    h, w, b = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((64, D), (50, D), (50,)))
    q = torch.rand(64, 50).softmax(-1).to(dtype)
    rewritten = Rewritten(program)
    loss, best = rewritten(h, w, b, q)
    expected, eagers = program(h, w, b, q)
    assert all(head.fused for head in rewritten.report.heads)
    assert torch.equal(best, eagers)  # of the roundings of a sum, linear makes one
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, b), torch.autograd.grad(expected, b))


def test_the_graph_carries_the_program_as_text() -> None:
    rewritten = Rewritten(distillation)
    rewritten(hidden(), weight(), hidden().detach(), weight().detach())
    text = next(line for line in rewritten.report.after.splitlines() if "fusedhead.head_rows" in line)
    assert "xlogy.Tensor" in text
    assert "log_softmax.int(v" in text


def most_likely(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor, y: Tensor) -> Tensor:
    """A divergence over the class that the teacher finds most likely, beside the loss."""
    logits = F.linear(h, w).flatten(0, -2)
    with torch.no_grad():
        values, indices = F.linear(ht, wt).flatten(0, -2).topk(1, -1)
        teacher = values.sigmoid()
    student = F.log_softmax(logits, -1).gather(-1, indices)
    return F.cross_entropy(logits, y.flatten()) + F.kl_div(student, teacher, reduction="batchmean")


def test_what_is_made_under_no_grad_comes_first_and_is_read() -> None:
    operands = hidden(), weight(), hidden().detach(), weight().detach(), labels()
    assert calls(most_likely, *operands, fused=2) == ["head_rows", "head_rows_loss"]
    right(most_likely, *operands, fused=2)


def test_what_is_made_under_no_grad_and_written_to_is_made_where_it_is_read() -> None:
    def program(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        with torch.no_grad():
            indices = F.linear(ht, wt).topk(1, -1).indices
            indices.add_(1).remainder_(V)
        return F.log_softmax(F.linear(h, w), -1).gather(-1, indices).mean()

    operands = [hidden(), weight(), hidden().detach(), weight().detach()]
    found = Rewritten(program)(*operands)
    torch.testing.assert_close(found, program(*operands))

"""Traps of graph structure: regions, breaks, several consumers, symbols, double backward.

Where the pass reads the program it is right; where it does not, it leaves the head and says why.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.eager_stack import Rewritten
from tests.programs.claims import B, D, T, V, compiled, hidden, labels, left, right, unseen, weight

EAGER = {"fusedhead.logits": "eager"}


def test_a_checkpointed_loss_is_right_and_recomputes() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        def body(h: Tensor, w: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(h, w), y)

        return checkpoint(body, h, w, use_reentrant=False)

    report = right(program, hidden(6, D), weight(), labels(6))
    assert "checkpointed" in report.heads[0].engine


def capped(h: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(F.linear(h, w).float() / 30) * 30


@pytest.mark.parametrize("head", [F.linear, capped, lambda h, w: h @ w.t()])
def test_a_checkpointed_head_with_the_loss_outside_is_taken_out(head: Callable[..., Tensor]) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = checkpoint(head, h, w, use_reentrant=False)
        return F.cross_entropy(z.view(-1, V), y)

    report = right(program, hidden(6, D), weight(), labels(6))
    assert "tag_activation_checkpoint" not in report.after


def test_logits_of_a_checkpoint_that_are_returned_too_are_taken_out() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = checkpoint(F.linear, h, w, use_reentrant=False)
        return F.cross_entropy(z, y), z

    right(program, hidden(6, D), weight(), labels(6))


def test_a_checkpoint_of_more_than_a_head_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(checkpoint(lambda h, w: F.linear(F.gelu(h), w), h, w, use_reentrant=False), y)

    left(program, hidden(6, D), weight(), labels(6), because="inside tag_activation_checkpoint, and its loss outside")


def test_a_checkpointed_head_that_is_not_fused_stays_a_checkpoint() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = checkpoint(F.linear, h, w, use_reentrant=False)
        return F.cross_entropy(z.cumsum(0), y) + F.cross_entropy(F.linear(h, w), y)

    report = right(program, hidden(6, D), weight(), labels(6))
    assert "tag_activation_checkpoint" in report.after


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_branch_on_data_between_head_and_loss_breaks_the_graph() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        if torch.all(y == -100):
            return z.sum() * 0
        return F.cross_entropy(z, y)

    unseen(program, hidden(6, D), weight(), labels(6), options=EAGER)


def test_dropout_before_the_head_is_drawn_once() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(F.dropout(h, 0.5, training=True), w)
        return F.cross_entropy(z, y) + z.logsumexp(-1).pow(2).mean(), z

    right(program, hidden(6, D), weight(), labels(6), options=EAGER)


def test_two_losses_on_the_same_logits_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = F.linear(h, w)
        lp = z.log_softmax(-1).gather(1, y.unsqueeze(1)).squeeze(1)
        return F.cross_entropy(z, y), F.logsigmoid(lp).mean(), F.cross_entropy(z.data, y)

    right(program, hidden(6, D), weight(), labels(6))


def test_detached_consumers_get_values_and_no_gradient() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        with torch.no_grad():
            probe = F.cross_entropy(z, y, reduction="none") + z.logsumexp(-1)
        return F.cross_entropy(z, y), probe

    right(program, hidden(6, D), weight(), labels(6))


def test_a_statistic_of_two_modes_has_a_gradient_in_one_of_them() -> None:
    def program(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        with torch.no_grad():
            probe = z.logsumexp(-1)
        return z.logsumexp(-1).sum(), probe

    right(program, hidden(6, D), weight())


def test_a_sum_times_zero_keeps_its_place_in_the_graph() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z, y) + 0 * z.sum(-1).sum()

    right(program, hidden(6, D), weight(), labels(6))


def test_two_backwards_through_one_loss_agree() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    h, w, y = hidden(6, D), weight(), labels(6)
    loss = Rewritten(program)(h, w, y)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w))
    assert all(map(torch.equal, first, second))


def test_double_backward_says_that_it_is_not_supported() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    h, w, y = hidden(6, D), weight(), labels(6)
    (dh,) = torch.autograd.grad(Rewritten(program)(h, w, y), h, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        dh.sum().backward()


@pytest.mark.parametrize("dim", [0, 1])
def test_symbolic_token_counts_take_one_graph(dim: int) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)[:, :-1].float().contiguous().view(-1, V)
        return F.cross_entropy(z, y[:, 1:].reshape(-1), ignore_index=-1, reduction="sum") / y.numel()

    rewritten = Rewritten(program, dynamic=True)
    w = weight()
    for size in (3, 4, 7):
        shape = [B, T]
        shape[dim] = size
        h, y = hidden(*shape, D), labels(*shape)
        got, expected = rewritten(h, w, y), program(h, w, y)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(expected, (h, w))):
            torch.testing.assert_close(a, b)
    assert [head.fused for head in rewritten.report.heads] == [True]


def test_rows_picked_by_a_mask_on_the_hidden_states_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h[mask], w), y[mask])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        right(program, hidden(), weight(), labels(), torch.rand(B, T) > 0.3)


def test_rows_picked_by_a_mask_on_the_logits_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w)[mask], y[mask])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        right(program, hidden(), weight(), labels(), torch.rand(B, T) > 0.3)


def test_one_row_more_than_needed_is_dropped() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h[:, -4:], w)[:, :-1]
        return z.log_softmax(-1).gather(2, y[:, -3:].unsqueeze(2)).squeeze(2)

    right(program, hidden(), weight(), labels())


def test_a_student_and_a_teacher_are_right() -> None:
    def program(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
        student = F.linear(h, w)
        with torch.no_grad():
            teacher = F.softmax(F.linear(h, v) / 2, -1)
        return F.kl_div(F.log_softmax(student / 2, -1), teacher, reduction="batchmean") + F.cross_entropy(student, y)

    right(program, hidden(6, D), weight(), weight(), labels(6), fused=2)


def test_a_loss_nobody_returns_disturbs_nothing() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        F.cross_entropy(z, y)
        z.logsumexp(-1)
        return h.sum()

    compiled(program, [hidden(6, D), weight(), labels(6)])


def test_the_same_loss_written_twice_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y) + F.cross_entropy(F.linear(h, w), y)

    right(program, hidden(6, D), weight(), labels(6), fused=2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("traced", [True, False])
def test_a_compiled_step_that_takes_its_own_gradients_is_right(traced: bool) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        leaf = w.detach().requires_grad_()
        loss = F.cross_entropy(F.linear(h, leaf), y)
        return loss.detach(), *torch.autograd.grad(loss, [leaf])

    inputs = torch.randn(6, D), torch.randn(V, D), labels(6)
    with torch._dynamo.config.patch(trace_autograd_ops=traced):
        if traced:
            right(program, *inputs)
        else:  # Dynamo breaks the graph there, or from torch 2.15 on compiles nothing of the step
            compiled(program, inputs)


def test_a_head_in_a_loop_over_heads_is_right() -> None:
    def program(h: Tensor, heads: Tensor, y: Tensor) -> Tensor:
        losses = [F.cross_entropy(F.linear(h, heads[k]), y[k]) for k in range(3)]
        return torch.stack(losses).mean()

    right(program, hidden(6, D), weight(3, V, D), labels(3, 6), fused=3)


def test_a_list_of_head_outputs_joined_along_the_vocabulary_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.cat([F.linear(h, part) for part in w.split(4)], -1), y)

    right(program, hidden(6, D), weight(), labels(6))


@pytest.mark.parametrize("kept", ["loss", "loss and logits"])
def test_logits_that_leave_a_checkpointed_region_are_left_alone(kept: str) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> object:
        def body(h: Tensor, y: Tensor) -> object:
            z = F.linear(h, w)
            return F.cross_entropy(z, y) if kept == "loss" else (F.cross_entropy(z, y), z)

        return checkpoint(body, h, y, use_reentrant=False)

    if kept == "loss":
        right(program, hidden(6, D), weight(), labels(6))
    else:
        left(program, hidden(6, D), weight(), labels(6), because="the logits leave the region that is checkpointed")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_number_read_out_between_head_and_loss_breaks_the_graph() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        scale = z.detach().abs().max().item()
        return F.cross_entropy(z, y) / scale

    unseen(program, hidden(6, D), weight(), labels(6), options=EAGER)


def test_what_nobody_reads_of_two_heads_disturbs_neither() -> None:
    def program(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        torch.stack([z, F.linear(h, v)], -1)
        return F.cross_entropy(z, y)

    right(program, hidden(6, D), weight(), weight(), labels(6))


def test_returned_logits_that_are_made_partly_under_no_grad_are_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        with torch.no_grad():
            half = z / 2
        return F.cross_entropy(z, y), half * scale

    scale = torch.tensor(3.0, requires_grad=True)
    left(program, hidden(6, D), weight(), labels(6), scale, because="partly with and partly without gradients")

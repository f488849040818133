"""Traps of labels and denominators: what is ignored, what is out of range, what the mean divides by.

Where the pass reads the program it is right; where it does not, it leaves the head and says why.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.programs.claims import B, D, T, V, hidden, labels, left, right, weight

N = 8


def some_ignored(ignore: int) -> Tensor:
    y = labels(N)
    y[1:4] = ignore
    return y


@pytest.mark.parametrize("ignore", [-1, 0, 3, V, -100])
def test_any_label_can_be_the_one_to_ignore(ignore: int) -> None:
    right(
        lambda h, w, y: F.cross_entropy(F.linear(h, w), y, ignore_index=ignore),
        hidden(N, D),
        weight(),
        some_ignored(ignore),
    )


def test_minus_a_hundred_is_ignored_though_nobody_wrote_it() -> None:
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), hidden(N, D), weight(), some_ignored(-100))


@pytest.mark.parametrize(("label", "gathers"), [(-1, False), (V, False), (-100, True), (V + 5, True)])
def test_a_label_out_of_range_raises_as_in_eager_code(label: int, gathers: bool) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return z.log_softmax(-1).gather(1, y.unsqueeze(1)).mean() if gathers else F.cross_entropy(z, y)

    h, w, y = hidden(N, D), weight(), some_ignored(label)
    with pytest.raises((IndexError, RuntimeError)) as expected:
        program(h, w, y)
    with pytest.raises(expected.type):
        Rewritten(program)(h, w, y)


def test_an_all_ignored_mean_is_nan_and_an_all_ignored_sum_is_zero() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return F.cross_entropy(z, y), F.cross_entropy(z, y, reduction="sum")

    right(program, hidden(N, D), weight(), torch.full((N,), -100))


def test_a_weighted_mean_divides_by_the_weights_of_the_labels() -> None:
    right(
        lambda h, w, y, c: F.cross_entropy(F.linear(h, w), y, weight=c, label_smoothing=0.2),
        hidden(N, D), weight(), some_ignored(-100), torch.rand(V),
    )  # fmt: skip


def test_a_sum_over_an_outside_count_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, count: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y, reduction="sum") / count

    right(program, hidden(N, D), weight(), some_ignored(-100), torch.tensor(5))


def test_a_z_loss_averages_over_all_tokens_and_the_loss_over_those_that_count() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z, y) + 1e-2 * z.logsumexp(-1).pow(2).mean()

    right(program, hidden(N, D), weight(), some_ignored(-100))


def test_a_product_with_a_mask_keeps_nan_where_ignoring_does_not() -> None:
    h = hidden(N, D).detach()
    h[2] = torch.nan
    h.requires_grad_()
    mask = torch.ones(N)
    mask[2] = 0
    y = labels(N)
    right(lambda h, w, y, m: (F.cross_entropy(F.linear(h, w), y, reduction="none") * m).sum(), h, weight(), y, mask)
    y[2] = -100
    right(lambda h, w, y, m: F.cross_entropy(F.linear(h, w), y, reduction="none").detach(), h, weight(), y, mask)


def test_rolled_labels_are_used_as_they_are() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).view(-1, V), torch.roll(y, -1).view(-1))

    right(program, hidden(), weight(), labels())


def test_labels_shifted_by_padding_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        shifted = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
        return F.cross_entropy(F.linear(h, w).float().view(-1, V), shifted.view(-1))

    right(program, hidden(), weight(), labels())


def test_logits_shifted_by_slicing_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        shifted = F.linear(h, w)[..., :-1, :].contiguous()
        return F.cross_entropy(shifted.view(-1, V), y[..., 1:].contiguous().view(-1))

    right(program, hidden(), weight(), labels())


def test_labels_of_eight_bits_are_right() -> None:
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w), y.long()), hidden(N, D), weight(), labels(N).to(torch.uint8))


def test_labels_of_32_bits_raise_as_in_eager_code() -> None:
    program = lambda h, w, y: F.cross_entropy(F.linear(h, w), y)  # noqa: E731
    arguments = hidden(N, D), weight(), labels(N).int()
    with pytest.raises(RuntimeError):
        program(*arguments)
    with pytest.raises(RuntimeError):
        Rewritten(program)(*arguments)


def test_labels_computed_after_the_projection_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z, (y * 3 + 1) % V)

    right(program, hidden(N, D), weight(), labels(N))


def test_probabilities_as_targets_are_right() -> None:
    right(lambda h, w, p: F.cross_entropy(F.linear(h, w), p), hidden(N, D), weight(), torch.rand(N, V).softmax(-1))


def test_all_eight_positional_arguments_are_read() -> None:
    loss = torch.nn.CrossEntropyLoss(torch.rand(V), None, 3, None, "sum", 0.1)
    right(lambda h, w, y: loss(F.linear(h, w), y), hidden(N, D), weight(), some_ignored(3))


def test_labels_drawn_from_the_same_logits_are_right() -> None:
    def program(h: Tensor, w: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z, z.detach().argmax(-1))

    right(program, hidden(N, D), weight())


def test_labels_that_a_sort_of_the_logits_gives_are_left_alone() -> None:
    def program(h: Tensor, w: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z, z.sort(-1).indices[:, 2])

    left(program, hidden(N, D), weight(), because="takes what comes from the logits in another place than its first")


def test_no_tokens_at_all_are_as_in_eager_code() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return F.cross_entropy(z, y), F.cross_entropy(z, y, reduction="sum")

    right(program, hidden(0, D), weight(), labels(0))


def test_labels_of_one_batch_row_do_not_broadcast() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.linear(h, w).log_softmax(-1).gather(2, y.expand(B, T).unsqueeze(2)).sum()

    right(program, hidden(), weight(), labels(1, T))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_labels_that_no_compiler_takes_raise(dtype: torch.dtype) -> None:
    """Eager code takes eight bits; Dynamo's fake tensors do not, whatever the backend."""
    program = lambda h, w, y: F.cross_entropy(F.linear(h, w), y)  # noqa: E731
    for compiled_program in (Rewritten(program), torch.compile(program, backend="eager")):
        with pytest.raises(RuntimeError, match="gather"):
            compiled_program(hidden(N, D), weight(), labels(N).to(dtype))


def test_indices_of_32_bits_into_log_probabilities_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.linear(h, w).log_softmax(-1).gather(1, y[:, None])

    right(program, hidden(N, D), weight(), labels(N).int())


@pytest.mark.parametrize(
    "y", [torch.rand(N, V), torch.rand(N), torch.zeros(N + 1, dtype=torch.int64)], ids=["ignored", "real", "longer"]
)
def test_labels_that_do_not_fit_raise_as_in_eager_code(y: Tensor) -> None:
    program = lambda h, w, y: F.cross_entropy(F.linear(h, w), y, ignore_index=3)  # noqa: E731
    arguments = hidden(N, D), weight(), y
    with pytest.raises((RuntimeError, ValueError)):
        program(*arguments)
    with pytest.raises(RuntimeError):
        Rewritten(program)(*arguments)


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize(("average", "reduces"), [(False, None), (None, False), (True, True), (False, True)])
def test_reductions_of_the_old_arguments_are_read(average: bool | None, reduces: bool | None) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y, None, average, 3, reduces)

    right(program, hidden(N, D), weight(), some_ignored(3))


def test_a_count_that_is_at_least_one_makes_no_nan() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y, reduction="sum") / (y != -100).sum().clamp(min=1)

    for y in (torch.full((N,), -100), some_ignored(-100)):
        right(program, hidden(N, D), weight(), y)


def test_labels_counted_off_by_rank_are_right() -> None:
    right(lambda h, w: F.cross_entropy(F.linear(h, w), torch.arange(N) + 2), hidden(N, D), weight())

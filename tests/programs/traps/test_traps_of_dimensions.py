"""Traps of which tensor and which dimension: classes that are not last, gathers that are not losses, views that mix.

Where the pass reads the program it is right; where it does not, it leaves the head and says why.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import B, D, T, V, compiled, hidden, labels, left, right, unseen, weight


@pytest.mark.parametrize("spelling", ["transpose", "permute", "mT", "movedim"])
def test_classes_in_dimension_one_are_right(spelling: str) -> None:
    moves = {
        "transpose": lambda z: z.transpose(1, 2),
        "permute": lambda z: z.permute(0, 2, 1),
        "mT": lambda z: z.mT,
        "movedim": lambda z: z.movedim(-1, 1),
    }
    right(lambda h, w, y: F.cross_entropy(moves[spelling](F.linear(h, w)), y), hidden(), weight(), labels())


def test_classes_left_last_mean_that_positions_are_the_classes() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    left(program, hidden(), weight(), labels(B, V, high=T), because="takes dimension 1 as the classes")


def test_classes_left_last_are_positions_even_where_the_sizes_agree() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    left(program, hidden(B, V, D), weight(), labels(B, V), because="takes dimension 1 as the classes")


def test_a_single_token_has_its_classes_in_dimension_zero() -> None:
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), hidden(D), weight(), torch.tensor(3))


def test_a_log_softmax_over_positions_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.log_softmax(F.linear(h, w), 1).gather(2, y.unsqueeze(2)).mean()

    left(program, hidden(), weight(), labels(), because="log_softmax runs over dimension 1")


def test_a_softmax_over_dimension_one_of_a_matrix_is_over_the_classes() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return -F.log_softmax(F.linear(h, w).flatten(0, 1), dim=1).gather(1, y.view(-1, 1)).mean()

    right(program, hidden(), weight(), labels())


def test_a_second_gather_on_the_picked_log_probabilities_is_no_loss() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, at: Tensor) -> Tensor:
        lp = F.linear(h, w).log_softmax(-1).gather(2, y.unsqueeze(2)).squeeze(2)
        return lp.gather(1, at)

    right(program, hidden(), weight(), labels(), labels(B, 3, high=T))


def test_several_labels_a_row_are_right() -> None:
    def program(h: Tensor, w: Tensor, candidates: Tensor) -> Tensor:
        return F.linear(h, w).log_softmax(-1).gather(2, candidates).sum(-1)

    right(program, hidden(), weight(), labels(B, T, 4))


def test_a_gather_along_the_rows_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, index: Tensor) -> Tensor:
        return F.linear(h, w).log_softmax(-1).gather(1, index)

    left(program, hidden(), weight(), labels(B, 2, V, high=T), because="gather runs over dimension 1")


def test_a_gather_of_fewer_rows_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.linear(h, w).log_softmax(-1).gather(2, y.unsqueeze(2))

    left(program, hidden(), weight(), labels(B, T - 2), because="another number of rows")


def test_indexing_by_an_arange_and_the_labels_agrees() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        lp = F.log_softmax(F.linear(h, w), -1)
        return -lp[torch.arange(len(y)), y].mean()

    compiled(program, [hidden(6, D), weight(), labels(6)])


def test_a_view_that_mixes_tokens_and_classes_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).view(B, -1), y)

    left(program, hidden(), weight(), labels(B, high=T * V), because="does not keep the vocabulary")


def test_a_view_that_splits_the_classes_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).view(-1, 4), y)

    left(program, hidden(6, D), weight(12, D), labels(18, high=4), because="does not keep the vocabulary")


def test_stacked_heads_flattened_together_are_left_alone_or_right() -> None:
    def program(h: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        z = torch.stack([F.linear(h, a), F.linear(h, b)], 1)
        return F.cross_entropy(z.reshape(-1, *z.shape[3:]), y.reshape(-1))

    compiled(program, [hidden(), weight(), weight(), labels(B, 2, T)])


def test_two_heads_of_very_different_sizes_are_both_right() -> None:
    def program(h: Tensor, w: Tensor, v: Tensor, y: Tensor, follows: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1)) + F.cross_entropy(F.linear(h[:, 0], v), follows)

    right(program, hidden(), weight(), weight(2, D), labels(), labels(B, high=2), fused=2)


def test_a_loop_over_rows_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        rows = [F.log_softmax(z, -1).gather(1, labels.unsqueeze(1)).squeeze(1) for z, labels in zip(F.linear(h, w), y)]
        return torch.stack(rows)

    right(program, hidden(), weight(), labels())


def test_a_mean_of_the_means_of_chunks_is_not_the_mean() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        total = 0.0
        for hc, yc in zip(h.chunk(3), y.chunk(3)):
            total = total + F.cross_entropy(F.linear(hc, w), yc, ignore_index=-1) / 3
        return total

    y = labels(6)
    y[:2], y[3] = torch.tensor([1, -1]), -1
    right(program, hidden(6, D), weight(), y, fused=3)


def test_classes_cut_off_after_the_head_get_no_gradient() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w)[..., :7].reshape(-1, 7), y.reshape(-1))

    right(program, hidden(), weight(), labels(high=7))


def test_rows_cut_off_the_weight_get_no_gradient() -> None:
    right(lambda h, w, y: F.cross_entropy(h @ w[:7].t(), y), hidden(6, D), weight(), labels(6, high=7))


def test_a_lone_projection_is_left_untouched() -> None:
    unseen(lambda h, w: F.linear(h, w), hidden(), weight())


def test_a_loss_whose_positions_are_as_many_as_its_classes_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).transpose(1, 2), y)

    right(program, hidden(B, V, D), weight(), labels(B, V))


def test_hidden_and_vocabulary_of_one_size_are_not_confused() -> None:
    right(lambda h, w, y: F.cross_entropy(h @ w, y), hidden(6, 4), weight(4, 4), labels(6, high=4))


def test_a_weight_on_the_left_is_right_or_left_alone() -> None:
    compiled(lambda h, w, y: F.cross_entropy((w @ h.t()).t(), y), [hidden(6, D), weight(), labels(6)])


def test_a_sum_over_everything_times_zero_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z, y) + z.sum() * 0 + z.mean() * 0.1

    right(program, hidden(6, D), weight(), labels(6))


def test_classes_moved_by_einops_are_right() -> None:
    rearrange = pytest.importorskip("einops").rearrange

    def moved(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(rearrange(F.linear(h, w), "b n c -> b c n"), y)

    def flattened(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(rearrange(F.linear(h, w), "b n c -> (b n) c"), rearrange(y, "b n -> (b n)"))

    for program in (moved, flattened):
        right(program, hidden(), weight(), labels())


def test_choices_scored_by_one_number_each_are_right() -> None:
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w).view(-1, 3), y), hidden(6, D), weight(1, D), labels(2, high=3))


def test_the_last_classes_and_the_last_positions_are_told_apart() -> None:
    def classes(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w)[..., -3:].reshape(-1, 3), y.reshape(-1))

    def positions(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w)[:, -3:].reshape(-1, V), y[:, -3:].reshape(-1))

    for program in (classes, positions):
        right(program, hidden(), weight(), labels(high=3))


def test_a_stack_of_rows_own_normalisers_is_right() -> None:
    right(lambda h, w: torch.stack([z.logsumexp(-1) for z in F.linear(h, w)]), hidden(), weight())


def test_rows_in_another_order_are_right_and_classes_are_left_alone() -> None:
    def rows(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z, y) + F.cross_entropy(z.flip(0), y) + F.cross_entropy(z.roll(1, 0), y)

    right(rows, hidden(6, D), weight(), labels(6))
    left(
        lambda h, w, y: F.cross_entropy(F.linear(h, w).flip(-1), y), hidden(6, D), weight(), labels(6),
        because="flip acts along the vocabulary",
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, D), (6, 0), (1, 2, 1, 3, D)])
def test_empty_and_many_dimensions_are_right(shape: tuple[int, ...]) -> None:
    def program(h: Tensor, w: Tensor) -> Tensor:
        return F.linear(h, w).logsumexp(-1)

    right(program, hidden(*shape), weight(V, shape[-1]))


def test_no_classes_at_all_are_as_in_eager_code() -> None:
    unseen(lambda h, w: F.linear(h, w).logsumexp(-1), hidden(6, D), weight(0, D))

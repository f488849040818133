"""Forms that look like a language model's loss and must not be rewritten: each is left alone, and says why.

The forms are those of real programs: adaptive and sampled softmax, margins, contrastive losses, mixtures, ...
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.capabilities import gathered_along_classes
from tests.one_rank import one_rank
from tests.programs.claims import D, V, hidden, labels, left, right, unseen, weight

# Dynamo looks at .grad of what crosses a graph break
LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def test_a_mixture_of_softmaxes_is_right() -> None:
    def program(h: Tensor, prior: Tensor, w: Tensor, y: Tensor) -> Tensor:
        mix = F.softmax(h @ prior.t(), -1)
        parts = torch.stack([F.softmax(F.linear(h * (k + 1), w), -1) for k in range(2)], 1)
        return F.nll_loss(torch.log((mix.unsqueeze(-1) * parts).sum(1)), y)

    right(program, hidden(6, D), weight(2, D), weight(), labels(6), fused=3)


def test_a_margin_on_the_target_logit_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(h), F.normalize(w))
        return F.cross_entropy(8 * (cosine - 0.35 * F.one_hot(y, V)), y)

    right(program, hidden(6, D), weight(), labels(6))


def test_a_contrastive_loss_in_both_directions_is_right() -> None:
    def program(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        z = scale.exp() * F.normalize(a) @ F.normalize(b).t()
        y = torch.arange(6)
        return F.cross_entropy(z, y) + F.cross_entropy(z.t(), y)

    right(program, hidden(6, D), hidden(6, D), torch.tensor(0.5, requires_grad=True), fused=2)


def test_classes_in_the_dimension_of_the_tokens_are_left_alone() -> None:
    def program(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        z, y = a @ b.t(), torch.arange(6)
        return F.cross_entropy(z, y) + F.cross_entropy(z.t(), y), z.cumsum(0)

    left(program, hidden(6, D), hidden(6, D), because="dimension 1 as the classes")


def test_an_adapter_added_to_the_head_is_right() -> None:
    def program(h: Tensor, w: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w) + 0.5 * F.linear(F.linear(h, a), b)
        return F.cross_entropy(z, y)

    right(program, hidden(6, D), weight(), weight(2, D), weight(V, 2), labels(6), fused=2)


def test_a_term_with_token_and_vocabulary_extent_is_right() -> None:
    def program(h: Tensor, w: Tensor, prior: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w) + prior, y)

    right(program, hidden(6, D), weight(), torch.randn(6, V), labels(6))


def test_a_class_mask_that_depends_on_the_token_is_right() -> None:
    def program(h: Tensor, w: Tensor, allowed: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).masked_fill(~allowed, -1e4), y)

    right(program, hidden(6, D), weight(), torch.rand(6, V) > 0.3, labels(6))


def test_a_filter_on_the_logits_own_size_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        floor = z.topk(3, -1).values[..., -1:]
        z = torch.where(z < floor, -1e4, z)
        return -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()

    right(program, hidden(6, D), weight(), labels(6))


def test_a_plain_head_is_fused() -> None:
    """What every form above is measured against."""
    right(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), hidden(6, D), weight(), labels(6))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
def test_a_loss_over_a_vocabulary_split_between_ranks_is_not_seen() -> None:
    class OfMyClasses(torch.autograd.Function):
        """Megatron's: the largest logit, the label's and the sum of exponentials are reduced over the ranks."""

        @staticmethod
        def forward(ctx, z, y):  # type: ignore[no-untyped-def]
            largest = z.max(-1).values
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            z = z - largest[:, None]
            logit = z.gather(1, y[:, None]).squeeze(1)
            dist.all_reduce(logit)
            p = z.exp_()
            total = p.sum(-1)
            dist.all_reduce(total)
            ctx.save_for_backward(p.div_(total[:, None]), y)
            return total.log() - logit

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            p, y = ctx.saved_tensors
            return (p - F.one_hot(y, p.shape[1])) * g[:, None], None

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return OfMyClasses.apply(F.linear(h, w), y).mean()

    with one_rank():
        unseen(program, hidden(6, D), weight(), labels(6))


@pytest.mark.filterwarnings("ignore:.*all_gather_tensor. is deprecated:FutureWarning")
def test_logits_gathered_from_all_ranks_are_left_alone() -> None:
    from torch.distributed._functional_collectives import all_gather_tensor

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(all_gather_tensor(F.linear(h, w), -1, dist.group.WORLD), y)

    inputs = torch.randn(6, D), torch.randn(V, D), labels(6)
    with one_rank():
        if gathered_along_classes():
            left(program, *inputs, because="is not known to treat tokens apart")
        else:  # Dynamo compiles nothing of it
            unseen(program, *inputs)


def test_a_projection_that_is_an_op_of_its_own_is_not_seen() -> None:
    with torch.library._scoped_library("traps", "FRAGMENT") as lib:
        lib.define("scaled_mm(Tensor x, Tensor w) -> Tensor")
        lib.impl("scaled_mm", lambda x, w: x @ w.t(), "CompositeExplicitAutograd")
        torch.library.register_autograd(
            "traps::scaled_mm",
            lambda ctx, g: (g @ ctx.saved_tensors[1], g.t() @ ctx.saved_tensors[0]),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
            lib=lib,
        )

        def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.ops.traps.scaled_mm(h, w), y)

        unseen(program, hidden(6, D), weight(), labels(6))


def test_a_weight_stored_in_eight_bits_is_right() -> None:
    def program(h: Tensor, w: Tensor, scale: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w.float() * scale), y)

    w = torch.randint(-128, 127, (V, D), dtype=torch.int8)
    right(program, hidden(6, D), w, torch.rand(V, 1) / 99, labels(6))


@LEAF
@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_on_the_head_is_not_seen(hook: str) -> None:
    """Dynamo breaks the graph between such a module and the loss."""
    head = torch.nn.Linear(D, V)
    getattr(head, hook)(lambda module, *grads: (grads[0][0] * 2,))
    unseen(lambda h, y: F.cross_entropy(head(h), y), hidden(6, D), labels(6))


@LEAF
def test_hooks_on_what_the_head_reads_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        x = h * 1
        x.register_hook(lambda g: g * 3)
        return F.cross_entropy(F.linear(x, w), y)

    right(program, hidden(6, D), weight(), labels(6))


def test_what_mixes_the_logits_of_tokens_is_left_alone() -> None:
    def balanced(h: Tensor, w: Tensor, y: Tensor) -> Tensor:  # Sinkhorn's
        z = F.linear(h, w)
        q = z.exp()
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
        return -(q.detach() * z.log_softmax(-1)).sum(-1).mean()

    def normalised(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.batch_norm(F.linear(h, w), None, None, training=True), y)

    def shifted(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z - z.max(), y)

    for program, because in (
        (balanced, "sum of the logits over other dimensions than the vocabulary"),
        (normalised, "aten.native_batch_norm.default is not known to treat tokens apart"),
        (shifted, "aten.max.default is not known to treat tokens apart"),
    ):
        left(program, hidden(6, D), weight(), labels(6), because=because)


@pytest.mark.parametrize("drawn", ["dropout", "rand_like", "gumbel", "multinomial"])
def test_random_numbers_drawn_for_every_logit_are_left_alone(drawn: str) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        if drawn == "dropout":
            z = F.dropout(z, 0.5)
        elif drawn == "rand_like":
            z = z + torch.rand_like(z)
        elif drawn == "gumbel":
            return F.cross_entropy(z, y) + F.gumbel_softmax(z)[:, 0].sum()
        else:
            y = torch.multinomial(z.detach().softmax(-1), 1).squeeze(1)
        return F.cross_entropy(z, y)

    left(program, hidden(6, D), weight(), labels(6), because="is not known to treat tokens apart")

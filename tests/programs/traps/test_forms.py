"""Forms that look like a language model's loss and must not be rewritten: each is left alone, and says why.

The forms are those of real programs: adaptive and sampled softmax, margins, contrastive losses, mixtures, ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.capabilities import gathered_along_classes
from tests.programs.claims import B, D, T, V, compiled, hidden, labels, left, right, unseen, weight

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


def test_an_angular_margin_taken_in_place_without_gradients_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(h), F.normalize(w)) * 0.9
        with torch.no_grad():
            target = cosine[torch.arange(6), y].arccos_() + 0.5
            cosine.arccos_()
            cosine[torch.arange(6), y] = target
            cosine.cos_()
        return F.cross_entropy(cosine * 8, y)

    left(
        program, hidden(6, D), weight(), labels(6), because="changes the logits in place where no gradient is recorded"
    )


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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
def test_a_gradient_only_consumer_of_the_logits_is_left_alone() -> None:
    class LargestLogit(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss, z):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(z)
            return loss.clone()

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            (z,) = ctx.saved_tensors
            top, at = torch.max(z, -1, keepdim=True)
            return g, torch.zeros_like(z).scatter(-1, at, top * 1e-2)

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return LargestLogit.apply(F.cross_entropy(z, y), z)

    left(program, hidden(6, D), weight(), labels(6), because="autograd.Function with a backward of its own")


@LEAF
def test_a_hook_on_the_logits_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        z.register_hook(lambda g: g * 2)
        return F.cross_entropy(z, y)

    left(program, hidden(6, D), weight(), labels(6), because="takes the logits")


@LEAF
def test_logits_that_retain_their_gradient_are_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        z.retain_grad()
        return F.cross_entropy(z, y)

    unseen(program, hidden(6, D), weight(), labels(6))


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


def test_a_backward_inside_the_program_is_left_to_dynamo() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(())
        for hc, yc in zip(h.detach().split(3), y.split(3)):
            leaf = hc.requires_grad_()
            loss = F.cross_entropy(F.linear(leaf, w.detach()), yc)
            total = total + torch.autograd.grad(loss, leaf)[0].sum() + loss.detach()
        return total

    compiled(program, [hidden(6, D), weight(), labels(6)])


def test_a_head_inside_a_function_transform_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        def loss(w: Tensor, h: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(h, w), y)

        return torch.func.grad(loss)(w, h, y)

    left(program, torch.randn(6, D), torch.randn(V, D), labels(6), because="torch.func")


def test_a_head_under_vmap_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return torch.func.vmap(lambda h, y: F.cross_entropy(F.linear(h, w), y))(h, y)

    left(program, torch.randn(B, T, D), torch.randn(V, D), labels(), because="inside a torch.func transform")


def test_a_function_transform_that_ended_before_the_head_does_not_matter() -> None:
    """Transformers makes attention masks with vmap."""

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(6)
        mask = torch.func.vmap(torch.func.vmap(lambda i, j: i >= j, (None, 0)), (0, None))(rows, rows)
        return F.cross_entropy(F.linear(mask.float() @ h, w), y)

    right(program, hidden(6, D), weight(), labels(6))


def test_a_head_in_float64_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    h, w = torch.randn(6, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    left(program, h.requires_grad_(), w.requires_grad_(), labels(6), because="is computed in torch.float64")


@LEAF
def test_head_and_loss_in_different_graphs_are_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        torch._dynamo.graph_break()
        return F.cross_entropy(z, y)

    unseen(program, hidden(6, D), weight(), labels(6), options={"fusedhead.logits": "eager"})


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
            own = z.gather(1, y[:, None]).squeeze(1)
            dist.all_reduce(own)
            p = z.exp_()
            total = p.sum(-1)
            dist.all_reduce(total)
            ctx.save_for_backward(p.div_(total[:, None]), y)
            return total.log() - own

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


@contextmanager
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class AlreadyFused(torch.autograd.Function):
    """A head that computes its gradients itself, as Liger's and others do."""

    @staticmethod
    def forward(ctx, h, w, y):  # type: ignore[no-untyped-def]
        z = h @ w.t()
        dz = z.softmax(-1) - F.one_hot(y, len(w))
        ctx.save_for_backward(dz @ w, dz.t() @ h)
        return F.cross_entropy(z, y, reduction="sum")

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        dh, dw = ctx.saved_tensors
        return g * dh, g * dw, None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
def test_a_head_that_is_fused_already_is_left_alone() -> None:
    left(AlreadyFused.apply, hidden(6, D), weight(), labels(6), because="the head is inside autograd_function_apply")


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

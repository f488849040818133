"""Forms in which other programs write a head: eager code's value and gradients, fused or left with a sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedhead.deferred.graph_outputs import DeferredLogits
from tests.eager_stack import Rewritten

N, D, V, K = 24, 16, 1024, 3
Y = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
YK = torch.randint(0, V, (N, K), generator=torch.Generator().manual_seed(2))


class Model(nn.Module):
    def __init__(self, of: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.of = nn.Linear(D, D), of
        self.w = nn.Parameter(torch.randn(V, D) * 0.3)
        self.several, self.biases = nn.Parameter(torch.randn(V, K, D) * 0.3), nn.Parameter(torch.randn(V, K))

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, torch.tanh(self.mix(x)))


def gradients(model: nn.Module, value: Tensor) -> list[Tensor | None]:
    return [value.detach(), *torch.autograd.grad(value, list(model.parameters()), allow_unused=True)]


def right(of: Callable[[Model, Tensor], Tensor], **compile_options: object) -> Rewritten:
    model, x = Model(of), torch.randn(N, D)
    run = Rewritten(model, **compile_options)  # type: ignore[arg-type]
    torch.testing.assert_close(gradients(model, run(x)), gradients(model, model(x)), rtol=1e-4, atol=1e-5)
    assert not run.report.errors
    return run


def chunked(weight: Callable[[Model, Tensor], Tensor], low: bool = False) -> Callable[[Model, Tensor], Tensor]:
    def loss(m: Model, h: Tensor) -> Tensor:
        total = torch.zeros(())
        for x, y in zip(h.chunk(4), Y.chunk(4)):
            z = F.linear(x.bfloat16() if low else x, weight(m, x))
            total = total + F.cross_entropy(z.float(), y, reduction="sum")
        return total / N

    return loss


def calls(run: Rewritten) -> int:
    return sum(line.count("= torch.ops.fusedhead.head_") for line in run.report.after.splitlines())


CHUNKS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "scaled anew": lambda m, x: m.w * 0.5,
    "cast twice anew": lambda m, x: m.w.double().float(),
    "normalised anew": lambda m, x: F.normalize(m.w, dim=-1),
    "transposed and copied anew": lambda m, x: m.w.t().contiguous().t(),
    "cast to its own dtype": lambda m, x: m.w.to(x.dtype),
}


@pytest.mark.parametrize("weight", CHUNKS)
def test_chunks_of_a_head_whose_weight_is_made_anew_are_one_sweep(weight: str) -> None:
    run = right(chunked(CHUNKS[weight]))
    assert all(head.fused for head in run.report.heads)
    assert calls(run) == 1


def test_chunks_of_a_head_whose_weight_is_cast_to_bfloat16_anew_are_one_sweep() -> None:
    model, x = Model(chunked(lambda m, x: m.w.bfloat16(), low=True)), torch.randn(N, D)
    run = Rewritten(model)
    torch.testing.assert_close(gradients(model, run(x)), gradients(model, model(x)), rtol=0.05, atol=2e-3)
    assert calls(run) == 1


def written_in_between(m: Model, h: Tensor) -> Tensor:
    scale = torch.ones(V, 1)
    first = F.cross_entropy(F.linear(h, m.w + scale), Y)
    scale[3:].mul_(2)
    return first + F.cross_entropy(F.linear(h, m.w + scale), Y)


def without_gradients_once(m: Model, h: Tensor) -> Tensor:
    with torch.no_grad():
        fixed = m.w * 0.5
    return F.cross_entropy(F.linear(h, fixed), Y) + F.cross_entropy(F.linear(h, m.w * 0.5), Y)


def dropped_twice(m: Model, h: Tensor) -> Tensor:
    return sum(F.cross_entropy(F.linear(h, F.dropout(m.w, 0.2)), Y) for _ in range(2))


@pytest.mark.parametrize("of", [written_in_between, without_gradients_once])
def test_weights_that_only_look_alike_stay_apart(of: Callable[[Model, Tensor], Tensor]) -> None:
    right(of)


def test_weights_that_are_drawn_stay_apart() -> None:
    model, x = Model(dropped_twice), torch.randn(N, D)
    run = Rewritten(model)
    torch.manual_seed(3)
    wanted = gradients(model, model(x))
    torch.manual_seed(3)
    torch.testing.assert_close(gradients(model, run(x)), wanted, rtol=1e-4, atol=1e-5)


SEVERAL: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "classes first": lambda m, h: F.cross_entropy(F.linear(h, m.several.flatten(0, 1)).view(-1, V, K), YK),
    "with biases": lambda m, h: F.cross_entropy(
        F.linear(h, m.several.flatten(0, 1), m.biases.flatten()).view(-1, V, K), YK, label_smoothing=0.1, ignore_index=3
    ),
    "each loss": lambda m, h: F.cross_entropy(
        F.linear(h, m.several.reshape(-1, D)).reshape(-1, V, K), YK, reduction="none"
    ).square().mean(),
}  # fmt: skip
if hasattr(F, "linear_cross_entropy"):
    SEVERAL["linear_cross_entropy"] = lambda m, h: F.linear_cross_entropy(h, m.several, YK)
    SEVERAL["linear_cross_entropy with biases"] = lambda m, h: F.linear_cross_entropy(
        h, m.several, YK, linear_bias=m.biases, reduction="sum"
    )


@pytest.mark.parametrize("form", SEVERAL)
def test_a_weight_of_several_heads_with_its_classes_first(form: str) -> None:
    assert [head.fused for head in right(SEVERAL[form]).report.heads] == [True]


TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros_like and scatter": lambda z: torch.zeros_like(z).scatter(1, Y[:, None], 1),
    "full_like and scatter_": lambda z: torch.full_like(z, 0.1 / (V - 1)).scatter_(1, Y.unsqueeze(1), 0.9),
    "zeros and scatter_": lambda z: torch.zeros(N, V).scatter_(1, Y[:, None], 1.0) * 0.9 + 0.1 / V,
    "one_hot": lambda z: F.one_hot(Y, V) * 0.9 + 0.1 / V,
    "one_hot, float": lambda z: F.one_hot(Y, V).float(),
}
# zero elsewhere, where an infinite log-probability makes NaN, which a sum does not tell: computed token by token
LABEL_ALONE = ("zeros_like and scatter", "one_hot, float")


@pytest.mark.parametrize("target", TARGETS)
def test_smoothed_labels_that_are_built(target: str) -> None:
    def loss(m: Model, h: Tensor) -> Tensor:
        z = F.linear(h, m.w)
        with torch.no_grad():
            wanted = TARGETS[target](z)
        return -(wanted * z.log_softmax(-1)).sum(-1).mean()

    (head,) = right(loss).report.heads
    assert head.fused
    assert ("gather" in head.computes) == (target not in LABEL_ALONE)  # statistics, no row program


def read_twice(z: Tensor) -> Tensor:
    t = torch.zeros_like(z).scatter(1, Y[:, None], 0.9)
    return -(t * z.log_softmax(-1)).sum(-1).mean() + t.square().mean()


def changed_afterwards(z: Tensor) -> Tensor:
    t = torch.full_like(z, 0.1, requires_grad=False)
    loss = -(t.scatter(1, Y[:, None], 0.9) * z.log_softmax(-1)).sum(-1).mean()
    t.mul_(2)
    return loss + t.mean()


def changed_in_between(z: Tensor) -> Tensor:
    t = torch.zeros_like(z).scatter_(1, Y[:, None], 0.9)
    t[:, 5] = 0.25
    return -(t * z.log_softmax(-1)).sum(-1).mean()


def two_labels(z: Tensor) -> Tensor:
    t = torch.zeros_like(z).scatter_(1, YK, 0.3)
    return -(t * z.log_softmax(-1)).sum(-1).mean()


def summed_over_everything(z: Tensor) -> Tensor:
    t = torch.full_like(z, 0.1 / V)
    t.scatter_(-1, Y[:, None], 0.9)
    return (-z.log_softmax(-1) * t).sum() / N


def kept_dimension(z: Tensor) -> Tensor:
    t = 1 - F.one_hot(Y, V).float()
    return (-(t * z.log_softmax(-1))).sum(dim=-1, keepdim=True).mean()


def of_the_logits(z: Tensor) -> Tensor:
    return z.logsumexp(-1).mean() - (F.one_hot(Y, num_classes=V) * z).sum(1).mean()


@pytest.mark.parametrize(
    "loss", [read_twice, changed_afterwards, changed_in_between, two_labels, summed_over_everything, kept_dimension,
             of_the_logits]
)  # fmt: skip
def test_targets_that_are_built_in_other_ways_are_right(loss: Callable[[Tensor], Tensor]) -> None:
    right(lambda m, h: loss(F.linear(h, m.w)))


def test_a_label_smoothed_head_with_a_forbidden_class_is_not_finite_where_eager_code_is_not() -> None:
    def loss(m: Model, h: Tensor) -> Tensor:
        z = F.linear(h, m.w).masked_fill(torch.arange(V) == V - 1, -float("inf"))
        return -(torch.zeros_like(z).scatter(1, Y[:, None], 1) * z.log_softmax(-1)).sum(-1).mean()

    model, x = Model(loss), torch.randn(N, D)
    assert Rewritten(model)(x).isnan()
    assert model(x).isnan()


def test_smoothed_labels_filled_and_scattered_in_place() -> None:
    def loss(m: Model, h: Tensor) -> Tensor:
        z = F.linear(h, m.w)
        with torch.no_grad():
            wanted = z.data.clone()
            wanted.fill_(0.1 / (V - 2))
            wanted.scatter_(1, Y[:, None], 0.9)
            wanted[:, 0] = 0
        return F.kl_div(z.log_softmax(-1), wanted, reduction="sum")

    assert [head.fused for head in right(loss).report.heads] == [True]


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*should not be instantiated")  # of Dynamo's own
def test_detached_deferred_logits_that_enter_another_graph_are_fused_there() -> None:
    model, x = Model(lambda m, h: F.linear(h, m.w)), torch.randn(N, D)
    other = Rewritten(lambda z, fixed: F.cross_entropy(z, Y) + F.cross_entropy(fixed * 2, Y))
    z, wanted = Rewritten(model)(x), model(x)
    found = other(z, z.detach())
    assert isinstance(z, DeferredLogits)
    torch.testing.assert_close(
        gradients(model, found), gradients(model, F.cross_entropy(wanted, Y) + F.cross_entropy(wanted.detach() * 2, Y)),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    assert z._plain is None
    assert all(head.fused for head in other.report.heads)


class ByHand(torch.autograd.Function):
    """A head with a backward of its own, as verl's FusedLinearForPPO."""

    @staticmethod
    def forward(ctx: object, h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logps = (h @ w.t()).log_softmax(-1)
        ctx.save_for_backward(h, w, y, logps)  # type: ignore[attr-defined]
        return logps.gather(-1, y[:, None]).squeeze(-1)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple:
        h, w, y, logps = ctx.saved_tensors  # type: ignore[attr-defined]
        dz = -logps.exp() * grad[:, None]
        dz = dz.scatter_add(1, y[:, None], grad[:, None])
        return dz @ w, dz.t() @ h, None


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*should not be instantiated")  # of Dynamo's own
def test_a_head_in_an_autograd_function_is_said_to_be_fused_by_hand() -> None:
    run = right(lambda m, h: -ByHand.apply(h, m.w, Y).mean())
    (head,) = run.report.heads
    assert not head.fused
    assert "already fused by hand" in head.reason


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*should not be instantiated")  # of Dynamo's own
def test_a_divergence_that_leaves_the_graph_at_a_boolean_mask_is_explained() -> None:
    """TRL's generalized_jsd_loss with labels."""

    def loss(m: Model, h: Tensor) -> Tensor:
        student, teacher = F.linear(h, m.w).log_softmax(-1), F.linear(h.detach(), m.w.detach() * 0.9).log_softmax(-1)
        mixture = torch.logsumexp(torch.stack([student, teacher]), 0) - 0.6931
        divergence = (F.kl_div(mixture, student, reduction="none", log_target=True)
                      + F.kl_div(mixture, teacher, reduction="none", log_target=True)) / 2  # fmt: skip
        return divergence[Y % 3 != 0].sum() / N

    run = right(loss)
    assert any("as wide as they are" in head.reason and "mask" in head.reason for head in run.report.heads)


def test_a_weight_argument_of_symbolic_sizes_is_explained_and_mark_static_helps() -> None:
    def loss(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), Y)

    h, w = torch.randn(N, D), torch.randn(V, D, requires_grad=True)
    run = Rewritten(loss, dynamic=True)
    torch.testing.assert_close(run(h, w), loss(h, w))
    assert "mark_static" in run.report.heads[0].reason
    torch._dynamo.mark_static(w)
    torch.compiler.reset()
    run = Rewritten(loss, dynamic=True)
    found, wanted = run(h, w), loss(h, w)
    torch.testing.assert_close(
        [found, *torch.autograd.grad(found, [w])], [wanted, *torch.autograd.grad(wanted, [w])], rtol=1e-4, atol=1e-6
    )
    assert run.report.heads[0].fused

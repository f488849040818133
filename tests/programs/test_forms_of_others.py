"""Forms in which other programs write a head: eager code's value and gradients, fused or left with a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from fusedhead.deferred.graph_outputs import DeferredLogits
from tests.eager_stack import Rewritten
from tests.programs.mixed_model import YK, D, K, Model, N, V, Y, gradients, right

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


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*should not be instantiated")  # of Dynamo's own
def test_detached_deferred_logits_that_enter_another_graph_are_fused_there() -> None:
    model, x = Model(lambda m, h: F.linear(h, m.w)), torch.randn(N, D)
    other = Rewritten(lambda z, fixed: F.cross_entropy(z, Y) + F.cross_entropy(fixed * 2, Y))
    z, wanted = Rewritten(model)(x), model(x)
    actual = other(z, z.detach())
    assert isinstance(z, DeferredLogits)
    torch.testing.assert_close(
        gradients(model, actual),
        gradients(model, F.cross_entropy(wanted, Y) + F.cross_entropy(wanted.detach() * 2, Y)),
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


def test_a_backend_may_not_make_a_size_constant_that_was_marked_dynamic() -> None:
    """Why a head of a symbolic vocabulary is left: no graph and no public function tells which sizes were marked."""
    sizes: list[list[int]] = []

    def constant(gm: GraphModule, inputs: object) -> Callable[..., Any]:
        values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
        sizes.append([int(size) for value in values if getattr(value, "requires_grad", False) for size in value.shape])
        return gm.forward  # type: ignore[no-any-return]

    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    step = torch.compile(loss, backend=constant, dynamic=True)
    h, w, wider = torch.randn(N, D), torch.randn(V, D, requires_grad=True), torch.randn(2 * V, D, requires_grad=True)
    for weight in (w, wider):  # what would be done: guards, and another graph for another vocabulary
        torch.testing.assert_close(step(h, weight, Y), loss(h, weight, Y))
    assert sizes == [[V, D], [2 * V, D]]
    torch.compiler.reset()
    torch._dynamo.mark_dynamic(w, 0)
    with pytest.raises(Exception, match=r"You marked .* as dynamic but your code specialized it"):
        step(h, w, Y)


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
    actual, wanted = run(h, w), loss(h, w)
    torch.testing.assert_close(
        [actual, *torch.autograd.grad(actual, [w])], [wanted, *torch.autograd.grad(wanted, [w])], rtol=1e-4, atol=1e-6
    )
    assert run.report.heads[0].fused

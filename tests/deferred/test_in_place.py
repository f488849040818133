"""In-place writes to deferred logits, their views and their operands reach what shares the memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.deferred.heads import (
    B,
    Model,
    Reversed,
    T,
    V,
    compare,
    deferring,
)  # fmt: skip
from tests.deferred.machine.steps import STATISTICS

X = torch.arange(B * T).reshape(B, T)
MANY = X.repeat(6, 1)  # tokens enough for logits without gradients to be deferred
SIDE = SimpleNamespace(labels=MANY)  # what statistics of the machine read besides logits


def a_temperature_in_place(z: Tensor) -> Tensor:
    z.div_(0.7)
    return F.cross_entropy(z.view(-1, V), X.view(-1))


def products_in_place(z: Tensor) -> Tensor:
    """torchtune's reverse divergence subtracts one product from another where it stands."""
    p, lp = z.softmax(-1), z.log_softmax(-1)
    product = p * lp
    product -= p * 0.5
    return product.sum(-1).mean()


def one_of_two_in_place(z: Tensor) -> Tensor:
    warm = z * 2
    warm /= 0.7
    return F.cross_entropy(warm.view(-1, V), X.view(-1)) + F.cross_entropy(z.view(-1, V), X.view(-1))


@pytest.mark.parametrize("form", [a_temperature_in_place, products_in_place, one_of_two_in_place])
def test_a_write_to_memory_that_nothing_shares_builds_no_logits(form: Any) -> None:
    assert compare(Model(), form, X).large == []


def in_place_on_a_view(z: Tensor) -> Tensor:
    shifted = z[:, :-1][:, -3:]
    shifted.div_(0.7)
    return F.cross_entropy(shifted.reshape(-1, V), X[:, :3].reshape(-1)) + z.pow(2).mean()


def a_copy_before_the_write(z: Tensor) -> Tensor:
    doubled, view = z * 2, z.view(-1, V)
    z[:, :, 7] = -1.0
    return F.cross_entropy(view, X.view(-1)) + doubled.pow(2).mean()


def a_result_before_the_write(z: Tensor) -> Tensor:
    doubled = z * 2
    z.div_(0.7)
    return F.cross_entropy(z.view(-1, V), X.view(-1)) + torch.logsumexp(doubled, -1).mean()


def augmented_assignment(z: Tensor) -> Tensor:
    rows = z.view(-1, V)
    rows *= 0.5
    return F.cross_entropy(rows, X.view(-1)) + z.sum() * 1e-3


def used_as_a_tensor_after_the_write(z: Tensor) -> Tensor:
    z.mul_(0.5)
    return F.cross_entropy(z.view(-1, V), X.view(-1)) + torch.sin(z).mean()


def backward_of_another_function(z: Tensor) -> Tensor:
    z.mul_(0.5)
    return F.cross_entropy(Reversed.apply(z).view(-1, V), X.view(-1))


@pytest.mark.parametrize(
    "form",
    [
        in_place_on_a_view, a_copy_before_the_write, a_result_before_the_write, augmented_assignment,
        used_as_a_tensor_after_the_write, backward_of_another_function,
    ],
)  # fmt: skip
def test_writes_reach_everything_that_shares_the_memory(form: Any) -> None:
    compare(Model(), form, X)


def test_two_names_of_one_tensor_see_a_write(model: Model) -> None:
    z, real = deferring(model)(X), model(X)
    same = z
    z /= 0.7
    assert same is z
    torch.testing.assert_close(same + 0, real / 0.7)
    with torch.no_grad():
        z.mul_(2)  # without a gradient: what stands for the tensor is not changed behind autograd's back
    torch.testing.assert_close(same + 0, real / 0.35)


def test_an_operand_written_to_later_was_read_when_it_was_given(model: Model) -> None:
    temperature = torch.full((B, T, 1), 0.5)
    z, real = deferring(model)(X) / temperature, model(X) / temperature
    temperature.zero_()
    torch.testing.assert_close(torch.logsumexp(z, -1), torch.logsumexp(real, -1))
    torch.testing.assert_close(z + 0, real)


ASKED = ("logsumexp", "entropy", "losses", "mean")
WRITES = {"filled": lambda x: x.fill_(77), "through detach": lambda x: x.detach().mul_(2)}


def whole(z: Tensor) -> Tensor:
    return z


class RowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.shape = z.shape
        return z.sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.unsqueeze(-1).expand(ctx.shape)


USES = {
    "function": RowSum.apply,
    "vmap": torch.func.vmap(lambda row: row.sum(-1)),
    "reentrant checkpoint": lambda part: checkpoint(lambda z: z.sum(-1), part, use_reentrant=True),
}


@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_no_gradient_passes_a_write_by_where_cpp_takes_a_part(use: Any) -> None:
    """Eager code refuses the use. The numbers of what is deferred are right, and the gradient is the error."""
    model = Model()
    for run, refused in ((model, True), (deferring(model), False)):
        z = run(X)
        part = z.chunk(2, 0)[0]
        z.index_fill_(-1, torch.tensor([3]), -2.0)
        if refused:
            with pytest.raises(RuntimeError, match="its base or another view of its base has been modified inplace"):
                use(part)
            continue
        answer = use(part)
        torch.testing.assert_close(answer.detach(), z.detach()[:1].sum(-1))
        with pytest.raises(RuntimeError, match="its base or another view of its base has been modified inplace"):
            answer.sum().backward()


def shifted(z: Tensor) -> Tensor:
    return z[:, :-1]


@pytest.mark.parametrize(
    ("first", "mode", "part"),
    [
        ("logsumexp", torch.enable_grad, whole),
        ("logsumexp", torch.enable_grad, shifted),
        ("logsumexp", torch.inference_mode, whole),
        ("entropy", torch.no_grad, whole),
    ],
)
def test_a_write_to_an_answer_reaches_no_later_answer(first, mode, part):
    """Statistics are kept for the calls that follow: what is handed out is a copy."""
    model = Model()
    run = deferring(model)
    with mode():
        for write in WRITES.values():
            z, real = run(MANY), model(MANY)
            for each in (z, real):
                answer = STATISTICS[first](SIDE, part(each))
                with torch.no_grad():
                    write(answer)
            for name in ASKED:
                for of in (part, whole):
                    got, expected = (STATISTICS[name](SIDE, of(x)) for x in (z, real))
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")

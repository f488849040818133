"""What stands for hidden states takes their gradient in float32, and it is rounded when it has been summed."""

from __future__ import annotations

import pytest
import torch

import fusedhead.lowering.hidden_sum  # noqa: F401  registers torch.ops.fusedhead

OPS = torch.ops.fusedhead


def test_a_recipient_has_the_size_of_the_gathered_states_and_one_number(group: str) -> None:
    x = torch.zeros(3, 4, 5, dtype=torch.bfloat16)
    recipient, _ = OPS.hidden_sum(x, 1, 2, group)
    assert (recipient.shape, recipient.dtype) == ((3, 8, 5), torch.float32)
    assert recipient.untyped_storage().nbytes() == 4
    assert OPS.hidden_sum(x.double(), -1, 2, group)[0].dtype == torch.float64


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_its_gradient_is_rounded_once(dim: int, group: str) -> None:
    x = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    recipient, token = OPS.hidden_sum(x, dim, 1, group)
    small = torch.full((3, 4), 1 + 2.0**-8 + 2.0**-20)  # between two numbers of two bytes, above their middle
    (recipient * small).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, small.to(torch.bfloat16))
    assert token.requires_grad


@pytest.mark.parametrize("dim", [-1, 1])
def test_the_ops_are_what_their_fakes_say(dim: int, group: str) -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OPS.hidden_sum.default, (x, dim, 1, group), test_utils=tests)
    part = torch.randn(3, 4)
    torch.library.opcheck(OPS.sum_parts.default, (part, dim, 1, group, torch.bfloat16), test_utils=tests)


def test_it_is_differentiated_once(group: str) -> None:
    x = torch.zeros(3, requires_grad=True)
    recipient, _ = OPS.hidden_sum(x, -1, 1, group)
    (dx,) = torch.autograd.grad((recipient * x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        dx.sum().backward()

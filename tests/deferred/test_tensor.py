"""Deferred logits pass for the tensor they stand for, and become it, bit for bit, when somebody needs the numbers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.deferred.graph_outputs import DeferredLogits
from tests.deferred.heads import B, D, Model, Operations, T, V, deferring, gradients, is_deferred, tokens


@pytest.fixture
def model() -> Model:
    return Model()


def test_it_says_of_itself_what_the_real_tensor_says(model: Model) -> None:
    x = tokens()
    real, z = model(x), deferring(model)(x)
    assert isinstance(z, Tensor)
    assert torch.is_tensor(z)
    for name in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "layout", "is_cuda", "is_sparse"):
        assert getattr(z, name) == getattr(real, name), name
    assert (z.size(), z.stride(), z.numel(), len(z), z.dim()) == (real.size(), real.stride(), B * T * V, B, 3)
    assert z.is_floating_point()
    assert z.is_contiguous()
    assert z.grad_fn is not None
    assert z.grad is None
    assert hash(z) == hash(z)
    assert is_deferred(z)


def test_without_gradients_it_has_no_grad_fn(model: Model) -> None:
    x = tokens(16, 5)
    with torch.no_grad():
        z = deferring(model)(x)
    assert is_deferred(z)
    assert not z.requires_grad
    assert z.grad_fn is None
    torch.testing.assert_close(z + 0, model(x).detach())


def test_views_and_casts_are_followed_and_compute_nothing(model: Model) -> None:
    x = tokens()
    z, real = deferring(model)(x), model(x)
    steps = {
        "view": lambda t: t.view(-1, V),
        "shift": lambda t: t[..., :-1, :],
        "rows": lambda t: t[:, 2:4],
        "one": lambda t: t[1],
        "cast": lambda t: t.bfloat16(),
        "same": lambda t: t.float(),
        "scale": lambda t: t / 0.7,
        "mask": lambda t: t[x % 2 == 0],
        "moved": lambda t: t.transpose(1, 2),
        "detach": lambda t: t.detach(),
        "data": lambda t: t.data,
        "split": lambda t: t.split(4, 1)[1],
        "row": lambda t: list(t)[1],
        "log": lambda t: F.log_softmax(t, -1),
    }
    with Operations(1) as ran:
        result = {name: step(z) for name, step in steps.items()}
    assert ran.large == []
    assert result["same"] is z
    assert all(map(is_deferred, result.values()))
    for name, step in steps.items():
        expected, got = step(real), result[name]
        assert (got.shape, got.dtype, got.requires_grad) == (expected.shape, expected.dtype, expected.requires_grad)
        assert got.stride() == expected.stride() or name == "mask"
        torch.testing.assert_close(got.clone() + 0, expected + 0)


def test_the_plain_tensor_is_what_eager_code_makes_of_the_same_operands(model: Model) -> None:
    hidden: list[Tensor] = []

    class Returning(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.inner.mix(self.inner.embed(x)))
            return h, 5 * torch.tanh(self.inner.lm_head(h) / 5)

    h, z = deferring(Returning())(tokens())
    hidden.append(h)
    assert is_deferred(z)
    assert torch.equal(z, 5 * torch.tanh(F.linear(h, model.lm_head.weight) / 5))


def test_it_is_computed_once(model: Model) -> None:
    z = deferring(model)(tokens())
    with Operations() as ran:
        first = torch.deg2rad(z * 2)
        second = torch.deg2rad(z * 3)
        z.view(-1, V).sin()
    assert ran.large.count("mm") + ran.large.count("addmm") == 1
    torch.testing.assert_close(first * 1.5, second)
    assert not is_deferred(z)


def test_a_plain_use_is_differentiable(model: Model) -> None:
    x = tokens()
    wanted = gradients(model, (model(x) ** 2).mean())
    actual = gradients(model, (deferring(model)(x) ** 2).mean())
    torch.testing.assert_close(actual, wanted)


def test_gradients_through_a_loss_and_through_the_logits_add_up(model: Model) -> None:
    x, y = tokens(), tokens().view(-1)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z.view(-1, V), y) + (z[:, 0] ** 2).mean() + z.tanh().sum() * 1e-3

    wanted = gradients(model, loss(model(x)))
    torch.testing.assert_close(gradients(model, loss(deferring(model)(x))), wanted, rtol=1e-4, atol=1e-6)


def test_it_prints_as_a_tensor(model: Model) -> None:
    z = deferring(model)(tokens())
    assert repr(z.detach()).startswith("tensor([[[")
    assert "grad_fn=" in repr(z)
    assert f"{z[0, 0, 0].item():.3f}" == f"{z.detach()[0, 0, 0]:.3f}"


def test_numpy_lists_and_the_cpu_get_numbers(model: Model) -> None:
    x = tokens()
    z, real = deferring(model)(x).detach(), model(x).detach()
    np.testing.assert_allclose(z.numpy(), real.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(deferring(model)(x).detach()), real.numpy(), rtol=1e-5, atol=1e-6)
    assert len(deferring(model)(x)[0, 0].tolist()) == V
    assert torch.equal(deferring(model)(x).cpu(), deferring(model)(x))


def test_pickles_and_copies_are_plain_tensors(model: Model) -> None:
    x = tokens()
    z = deferring(model)(x).detach()
    stored = io.BytesIO()
    torch.save({"logits": z}, stored)
    stored.seek(0)
    copies = [pickle.loads(pickle.dumps(z)), copy.deepcopy(z), copy.copy(z), torch.load(stored)["logits"]]
    for other in copies:
        assert type(other) is Tensor
        torch.testing.assert_close(other, model(x).detach())


def test_a_deep_copy_with_gradients_is_refused_as_for_any_result(model: Model) -> None:
    with pytest.raises(RuntimeError, match="created explicitly by the user"):
        copy.deepcopy(deferring(model)(tokens()))


def test_functions_that_know_no_subclass_get_numbers_and_gradients(model: Model) -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, t: Tensor) -> Tensor:
            with torch._C.DisableTorchFunctionSubclass():
                return t * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * 2

    x = tokens()
    wanted = gradients(model, Twice.apply(model(x)).pow(2).mean())
    actual = gradients(model, Twice.apply(deferring(model)(x)[:, :]).pow(2).mean())
    torch.testing.assert_close(actual, wanted)


def test_it_keeps_hidden_states_alive_no_longer_than_itself(model: Model) -> None:
    z = deferring(model)(tokens())
    piece = z.view(-1, V)[3:].float()
    leaf = weakref.ref(next(leaf for leaf in z._deferred.leaves if leaf.shape == (B, T, D)))
    tensor = weakref.ref(piece)
    gc.disable()
    try:
        del z, piece
        assert tensor() is None
        assert leaf() is None
    finally:
        gc.enable()


def test_no_memory_of_the_logits_size_is_behind_it(model: Model) -> None:
    z = deferring(model)(tokens())
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="data pointer"):
        z.data_ptr()
    assert type(z) is DeferredLogits

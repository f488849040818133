"""The engine of token programs: windows change no result and no gradient, and memory stays within the budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fusedhead.lowering.token_ops  # noqa: F401  registers the ops
from fusedhead.kernels.tokenwise import engine as tokenwise_engine
from fusedhead.kernels.tokenwise.program import read
from fusedhead.lowering.plan.problem import MIB
from tests.lowering.divergence import DIVERGENCE, D, N, V, divergence, inputs
from tests.lowering.heads import FIXED, size, watch


@pytest.mark.parametrize("tokens", [1, 5, 37])
def test_windows_change_nothing(tokens: int) -> None:
    tensors = inputs()
    with torch.no_grad():
        got, best = tokenwise_engine.head_rows(read(DIVERGENCE), tensors, tokens)
        expected, indices = divergence(tensors)
    torch.testing.assert_close(got, expected)
    assert torch.equal(best, indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_err_no_more_than_eager_code(dtype: torch.dtype) -> None:
    tensors = inputs(dtype=dtype)
    truth = [t.detach().double().requires_grad_() for t in tensors]
    text = DIVERGENCE.replace("float32", str(dtype).removeprefix("torch.")) if dtype == torch.float64 else DIVERGENCE
    out = torch.ops.fusedhead.head_rows(tensors, text, 0)[0]
    upstream = torch.randn(N)
    at = (0, 1, 4, 5)
    got = torch.autograd.grad(out, [tensors[i] for i in at], upstream.to(out.dtype))
    eager = torch.autograd.grad(divergence(tensors)[0], [tensors[i] for i in at], upstream.to(out.dtype))
    z, t = F.linear(*truth[:2]), F.linear(*truth[4:6])
    p = (t * 0.5).softmax(1)
    exact = (torch.xlogy(p, p) - p * z.log_softmax(1)).sum(1)
    true = torch.autograd.grad(exact, [truth[i] for i in at], upstream.double())
    for ours, theirs, right in zip(got, eager, true):
        assert ours.dtype == dtype
        allowed = (theirs - right).norm() + 4 * torch.finfo(dtype).eps * right.norm() * (dtype != torch.bfloat16)
        assert (ours - right).norm() <= 1.05 * allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [5, 37])
def test_a_bias_is_rounded_with_the_product_as_linear_rounds_it(dtype: torch.dtype, tokens: int) -> None:
    name = str(dtype).removeprefix("torch.")
    program = read(f"v0 = head(r0, t1, t2, r3, 'addcol:0 round:{name} mul:0.5 round:{name}', {name}); return v0")
    h, w, bias = (torch.randn(*s).to(dtype) for s in ((N, D), (V, D), (V,)))
    tensors = [h, w, bias.float()[None], torch.empty(N, 0)]
    eager = [t.clone().requires_grad_() for t in (h, w, bias)]
    z = F.linear(*eager) * 0.5
    (got,) = tokenwise_engine.head_rows(program, tensors, tokens)
    assert torch.equal(got, z)  # rounded before the sum as well, 30 % of the entries differ
    upstream = torch.randn(N, V).to(dtype)
    ours = tokenwise_engine.head_rows_backward(program, [upstream], tensors, [True, True, True, False], tokens)
    theirs = torch.autograd.grad(z, eager, upstream)
    truth = [t.detach().double().requires_grad_() for t in eager]
    true = torch.autograd.grad(F.linear(*truth) * 0.5, truth, upstream.double())
    for a, b, right in zip(ours, theirs, true):
        assert a is not None
        windows = 1 if tokens == N else 2  # each rounds its share of dw
        assert (a.reshape(b.shape) - right).norm() <= 1.05 * windows * (b - right).norm()


def test_a_bias_alone_gets_its_gradient() -> None:
    program = read("v0 = head(r0, t1, t2, r3, 'addcol:0 round:bfloat16', bfloat16); return v0")
    tensors = [torch.randn(N, D).bfloat16(), torch.randn(V, D).bfloat16(), torch.randn(1, V), torch.empty(N, 0)]
    upstream = torch.randn(N, V).bfloat16()
    found = tokenwise_engine.head_rows_backward(program, [upstream], tensors, [False, False, True, False], 7)
    torch.testing.assert_close(found[2], upstream.float().sum(0)[None])
    assert [g is None for g in found] == [True, True, False, True]


def test_an_input_without_gradient_gets_none() -> None:
    tensors = inputs()
    tensors[1].requires_grad_(False)
    tensors[4].requires_grad_(False)
    torch.ops.fusedhead.head_rows(tensors, DIVERGENCE, 0)[0].sum().backward()
    assert tensors[0].grad is not None
    assert tensors[1].grad is None
    assert tensors[4].grad is None
    assert tensors[5].grad is not None


def test_no_tokens_give_empty_results_and_zero_gradients() -> None:
    tensors = inputs(n=0)
    out, best = torch.ops.fusedhead.head_rows(tensors, DIVERGENCE, 0)
    assert out.shape == (0,)
    assert best.shape == (0, 3)
    out.sum().backward()
    assert tensors[1].grad is not None
    assert not tensors[1].grad.any()


def test_a_window_stays_within_its_budget_forward_and_backward() -> None:
    budget, tensors = 6, inputs(512, 24_576, 32)  # the logits of each head have 48 MiB
    out, peak, _ = watch(lambda: torch.ops.fusedhead.head_rows(tensors, DIVERGENCE, budget)[0])
    assert peak <= budget * MIB + FIXED
    grads, peak, _ = watch(lambda: torch.autograd.grad(out.sum(), [tensors[i] for i in (0, 1, 4, 5)]))
    assert peak - size(grads) <= budget * MIB + FIXED


@pytest.mark.parametrize("limit", [1, N, N + 1])
def test_kept_products_spare_the_second_one_of_every_head_and_change_nothing(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, counts, seen = [], [], []
    product = tokenwise_engine.head_product
    monkeypatch.setattr(tokenwise_engine, "head_product", lambda *given: seen.append(0) or product(*given))
    for below in (0, limit * 2 * 4 * V):
        torch.manual_seed(0)
        tensors = inputs()
        seen.clear()
        out, best, *products = torch.ops.fusedhead.head_rows(tensors, DIVERGENCE, 0, below)
        out.square().sum().backward()
        assert [len(z) for z in products] == ([] if not below else [N if limit > N else 2] * 2)
        found.append([out, best, *(t.grad for t in tensors if t.grad is not None)])
        counts.append(len(seen))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
    assert counts == [2, 2]  # of the backward sweep alone, where nothing is kept; else of the forward sweep alone


@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("narrow", [False, True])
def test_groups_change_nothing(group: int, narrow: bool) -> None:
    tensors = [t.detach() for t in inputs()]
    needs = [True, True, False, False] * 2
    program, upstream = read(DIVERGENCE), [torch.rand(N), None]
    expected = tokenwise_engine.head_rows_backward(program, upstream, tensors, needs, N)
    found = tokenwise_engine.head_rows_backward(program, upstream, tensors, needs, 5, False, narrow, group)
    for a, b in zip(found, expected):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)

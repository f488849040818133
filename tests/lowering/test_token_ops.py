"""Token programs: text that reads back, results and gradients that no window changes, memory within its budget."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fusedhead.lowering.token_ops  # noqa: F401  registers the ops
from fusedhead.kernels.tokenwise import engine as tokenwise_engine
from fusedhead.kernels.tokenwise.program import Unspeakable, argument_text, read
from fusedhead.lowering.plan.problem import MIB
from tests.lowering.heads import opcheck
from tests.lowering.test_memory import FIXED, size, watch

N, V, D = 37, 50, 8
DIVERGENCE = """\
v0 = head(r0, t1, t2, r3, '', float32)
v1 = log_softmax.int(v0, 1, float32)
v2 = head(r4, t5, t6, r7, 'mul:0.5', float32)
v3 = softmax.int(v2, 1, float32)
v4 = xlogy.Tensor(v3, v3)
v5 = mul.Tensor(v3, v1)
v6 = sub.Tensor(v4, v5)
v7 = sum.dim_IntList(v6, [1])
v8 = topk.default(v0, 3, 1)
v9 = item(v8, 1)
return v7, v9""".replace("\n", "; ")


def inputs(n: int = N, v: int = V, d: int = D, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    def head() -> list[Tensor]:
        h, w = torch.randn(n, d, dtype=dtype), torch.randn(v, d, dtype=dtype)
        return [h.requires_grad_(), w.requires_grad_(), torch.empty(0, v), torch.empty(n, 0)]

    return head() + head()


def divergence(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    z, t = F.linear(*tensors[:2]), F.linear(*tensors[4:6])
    p = (t.float() * 0.5).softmax(1)
    return (torch.xlogy(p, p) - p * z.float().log_softmax(1)).sum(1), z.topk(3, 1)[1]


def test_a_program_reads_back_as_it_was_written() -> None:
    assert read(DIVERGENCE).text == DIVERGENCE
    odd = """\
v0 = head(r0, t1, t2, r3, '', bfloat16)
v1 = clamp.default(v0, -inf, 1e-05)
v2 = sum.dim_IntList(v1, [1], True, dtype=float32)
return v2""".replace("\n", "; ")
    assert read(odd).text == odd
    assert "\n" not in odd


@pytest.mark.parametrize("text", ["return v0[1]", "v0 = __import__('os'); return v0.x", "v0 = head(open); return v0"])
def test_a_program_is_data(text: str) -> None:
    with pytest.raises((Unspeakable, AttributeError)):
        read(text)


def test_what_a_program_has_no_form_for_is_named() -> None:
    with pytest.raises(Unspeakable, match="object"):
        argument_text(object())


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


def test_the_op_keeps_its_contract() -> None:
    opcheck(torch.ops.fusedhead.head_rows.default, (inputs(), DIVERGENCE, 0))
    with torch.no_grad():
        g = torch.randn(N)
        needs = [True, True, False, False, True, True, False, False]
        given = ([g, g.new_empty(())], [t.detach() for t in inputs()], DIVERGENCE, 0, needs)
        opcheck(torch.ops.fusedhead.head_rows_backward.default, given)


@pytest.mark.parametrize("loss", ["cross_entropy_loss.default(v0, r4, None, reduction=0)",
                                  "nll_loss_nd.default(v0, r4, None, reduction=0)"])  # fmt: skip
def test_a_loss_a_token_has_a_loss_a_token_where_their_number_is_a_symbol(loss: str) -> None:
    text = f"v0 = head(r0, t1, t2, r3, '', float32); v1 = {loss}; return v1"
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def symbolic(tensor: Tensor) -> Tensor:
        dims = [DimDynamic.DYNAMIC if n == N else DimDynamic.STATIC for n in tensor.shape]
        context = StatelessSymbolicContext(dims)
        return mode.from_tensor(tensor, source=ConstantSource(f"x{id(tensor)}"), symbolic_context=context)

    real = [*inputs()[:4], torch.randint(0, V, (N,))]
    tensors = [symbolic(t) for t in real]
    (out,) = torch.ops.fusedhead.head_rows(tensors, text, 0)
    assert isinstance(out.shape[0], torch.SymInt)
    assert out.ndim == 1
    assert torch.ops.fusedhead.head_rows(real, text, 0)[0].shape == (N,)


def test_double_backward_is_refused() -> None:
    tensors = inputs()
    out = torch.ops.fusedhead.head_rows(tensors, DIVERGENCE, 0)[0]
    (g,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"differentiated once|does not require grad"):
        g.sum().backward()


def test_windows_compiled_by_inductor_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenwise_engine, "windows", lambda n, *_: [(slice(0, n), True)])
    leaves = inputs()
    tensors = [t * 1 if t.requires_grad else t for t in leaves]  # what made an operand does not matter
    out = torch.ops.fusedhead.head_rows(tensors, DIVERGENCE, 0)[0]
    got = torch.autograd.grad(out.sum(), [leaves[0], leaves[5]])
    expected = torch.autograd.grad(divergence(leaves)[0].sum(), [leaves[0], leaves[5]])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_threads_that_need_the_same_window_first_all_get_it() -> None:
    expected, failures = divergence(tensors := inputs(n=11))[0].detach(), []

    def work() -> None:
        out = torch.ops.fusedhead.head_rows(tensors, DIVERGENCE, 0)[0]
        torch.autograd.grad(out.sum(), tensors[:2])
        if not torch.allclose(out, expected, atol=1e-5):
            failures.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_window_stays_within_its_budget_forward_and_backward() -> None:
    budget, tensors = 6, inputs(512, 24_576, 32)  # the logits of each head have 48 MiB
    out, peak, _ = watch(lambda: torch.ops.fusedhead.head_rows(tensors, DIVERGENCE, budget)[0])
    assert peak <= budget * MIB + FIXED
    grads, peak, _ = watch(lambda: torch.autograd.grad(out.sum(), [tensors[i] for i in (0, 1, 4, 5)]))
    assert peak - size(grads) <= budget * MIB + FIXED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_sweep_gives_results_and_gradients_of_any_multiple(dtype: torch.dtype) -> None:
    tensors = inputs(dtype=dtype)
    needs = [t.requires_grad for t in tensors]
    c, absent = torch.rand(N), torch.empty(())
    leaves = [t for t in tensors if t.requires_grad]
    loss, best = torch.ops.fusedhead.head_rows_loss(tensors, [c, absent], DIVERGENCE, 0, needs)[:2]
    again, indices = torch.ops.fusedhead.head_rows(tensors, DIVERGENCE, 0)
    assert torch.equal(loss, again)
    assert torch.equal(best, indices)
    assert not best.requires_grad
    got = torch.autograd.grad((loss * c * 3).sum(), leaves)
    expected = torch.autograd.grad((again * c * 3).sum(), leaves)
    for a, b in zip(got, expected):
        assert (a - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()


def test_one_sweep_passes_opcheck_and_takes_no_tokens() -> None:
    tensors, c, absent = inputs(), torch.rand(N), torch.empty(())
    op, needs = torch.ops.fusedhead.head_rows_loss.default, [t.requires_grad for t in tensors]
    opcheck(op, (tensors, [c, absent], DIVERGENCE, 0, needs))
    none = inputs(n=0)
    found = op(none, [torch.empty(0), absent], DIVERGENCE, 0, needs)
    assert [list(f.shape) for f in found] == [[0], [0, 3], [0, D], [V, D], [0, D], [V, D]]
    assert not found[3].any()


def test_one_sweep_is_differentiated_once_and_for_what_was_asked() -> None:
    tensors, c = inputs(), torch.rand(N)
    ask = torch.ops.fusedhead.head_rows_loss
    loss = ask(tensors, [c, torch.empty(())], DIVERGENCE, 0, [t.requires_grad for t in tensors])[0]
    (first,) = torch.autograd.grad((loss * c).sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        first.sum().backward()
    loss = ask(tensors, [c, torch.empty(())], DIVERGENCE, 0, [False] * len(tensors))[0]
    with pytest.raises(RuntimeError, match="without its need"):
        (loss * c).sum().backward()


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


def test_the_profiler_shows_a_range_with_the_sizes_of_the_first_head() -> None:
    tensors = inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = torch.ops.fusedhead.head_rows(tensors, DIVERGENCE, 0, 0)[0]
        out.sum().backward()
    names = {event.key.split(" ")[0] for event in profile.key_averages() if f" N={N} " in event.key}
    assert names == {"fusedhead::head_rows", "fusedhead::head_rows_backward"}

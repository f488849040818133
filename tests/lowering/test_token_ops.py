"""Token programs: text that reads back, results and gradients that no window changes, memory within its budget."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fusedhead.lowering.token_ops  # noqa: F401  registers the ops
from fusedhead.kernels.tokenwise import engine as tokenwise_engine
from tests.lowering.divergence import DIVERGENCE, D, N, V, divergence, inputs
from tests.lowering.heads import opcheck


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


def test_the_profiler_shows_a_range_with_the_sizes_of_the_first_head() -> None:
    tensors = inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = torch.ops.fusedhead.head_rows(tensors, DIVERGENCE, 0, 0)[0]
        out.sum().backward()
    names = {event.key.split(" ")[0] for event in profile.key_averages() if f" N={N} " in event.key}
    assert names == {"fusedhead::head_rows", "fusedhead::head_rows_backward"}

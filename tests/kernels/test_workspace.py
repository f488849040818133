"""The workspace of the torch engine, measured by the profiler: never the logits, never more than the budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fusedhead.kernels.contract import Needs
from fusedhead.kernels.transform.transform import parse
from fusedhead.lowering.plan.plan import plan
from fusedhead.lowering.plan.problem import MIB, Problem
from fusedhead.rules.pointwise_codegen import function_of
from tests.lowering.heads import FIXED, OPS, Operands, leaves, none, operands, size, watch

N, V, D = 512, 24_576, 32
BUDGET = {torch.float32: 6, torch.bfloat16: 3, torch.float16: 3}  # MiB; the logits have 48 and 24
GELU = function_of(torch.ops.aten.gelu.default, ("z",), (), 0).text


@pytest.fixture
def heads(multiplied) -> Operands:
    return operands(N, V, D, dtype=multiplied[0], u=False)


@pytest.mark.parametrize("transform", ["", "mul:0.1 tanh mul:3.0", "addcol:0"])
def test_a_loss_with_gradients_stays_within_its_budget(heads, transform):
    budget = BUDGET[heads.h.dtype]
    assert N * V * heads.h.element_size() >= 8 * budget * MIB
    c, e = torch.full((N,), 1 / N), none(heads.h)
    call = (*heads, c, -c[:, None], e, e, transform, "lse,picked")
    for memory in (budget, -1):
        got, peak, largest = watch(lambda m=memory: OPS.head_loss(*call, m, True, True, False, False))
        gradients = size(got[3:5])
        assert peak - gradients <= budget * MIB + FIXED
        assert largest <= max(budget * MIB, size([heads.w]))


def test_statistics_and_their_backward_stay_within_the_budget(heads):
    budget = BUDGET[heads.h.dtype]
    o = leaves(heads, "h w")
    got, peak, _ = watch(lambda: OPS.head_stats(*o, "", "lse,picked,entropy", budget))
    assert peak <= budget * MIB + FIXED
    upstream = [torch.ones_like(got[i]) for i in (0, 1, 3)]
    grads, peak, _ = watch(lambda: torch.autograd.grad([got[i] for i in (0, 1, 3)], (o.h, o.w), upstream))
    assert peak - size(grads) <= budget * MIB + FIXED


def test_a_transposed_weight_is_read_where_it_lies(heads):
    o = heads._replace(w=heads.w.t().contiguous().t())
    _, peak, _ = watch(lambda: OPS.head_stats(*o, "", "lse,picked", 2))
    assert peak < size([o.w]) or o.h.dtype != torch.float32
    assert peak <= 3 * MIB


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_the_planners_prediction_bounds_what_is_held(heads, multiplied, needs):
    c, e = torch.full((N,), 1 / N), none(heads.h)
    for memory in (0, -1, 16):
        arguments = (*heads, c, -c[:, None], e, e, "", "lse,picked", memory, *needs, False, False)
        got, peak, _ = watch(lambda a=arguments: OPS.head_loss(*a))
        head = Problem(N, V, D, heads.h.dtype, "cpu", multiplied[1], Needs(*needs, False, False))
        chosen = plan(head, memory=memory)
        assert peak - size(got[3:5]) <= chosen.predicted_bytes + FIXED


@pytest.mark.parametrize("transform", ["", "mul:0.1 tanh mul:3.0", f"fn:{GELU}", f"fn:{GELU.rpartition('|')[0]}"])
def test_a_training_step_holds_less_than_a_quarter_of_the_logits(multiplied, transform):
    n, v = 1024, 32_000
    dtype, products = multiplied
    o = operands(n, v, 64, dtype=dtype, u=False)
    c, e = torch.full((n,), 1 / n), none(o.h)
    arguments = (*o, c, -c[:, None], e, e, transform, "lse,picked", 0, True, True, False, False)
    got, peak, _ = watch(lambda: OPS.head_loss(*arguments))
    held = peak - size(got[3:5])
    assert held < n * v * dtype.itemsize / 4
    assert held <= plan(Problem(n, v, 64, dtype, "cpu", products, transform=parse(transform))).predicted_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_loss_are_multiplied_where_they_lie(dtype):
    """One call for dh and dw; of a factor of 1 not even that reads them (`fusedhead.donated`)."""
    seen = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.fusedhead.scale_.default:
                seen.append([x.shape for x in args[0]])
            return func(*args, **(kwargs or {}))

    compiled = torch.compile(
        lambda h, w, y: F.cross_entropy(F.linear(h, w), y), backend="fusedhead", options={"fusedhead.min_logits": 0}
    )
    o = leaves(operands(N, V, D, dtype=dtype, u=False), "h w")
    for factor in (1.0, 2.5):
        loss = compiled(o.h, o.w, o.y[:, 0]) * factor
        with Calls():
            grads, peak, _ = watch(lambda loss=loss: torch.autograd.grad(loss, (o.h, o.w)))
        assert peak <= FIXED or factor != 1
        truth = torch.autograd.grad(F.cross_entropy(F.linear(o.h, o.w), o.y[:, 0]) * factor, (o.h, o.w))
        for actual, expected in zip(grads, truth):
            assert (actual - expected).norm() <= 0.01 * expected.norm()
    assert seen == [[o.h.shape, o.w.shape]] * 2

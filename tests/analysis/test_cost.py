"""What a report says of float8 products where they are asked for: that they are used, or why not, and their error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

import fusedhead
from fusedhead.analysis import cost
from fusedhead.kernels.transform.transform import parse
from fusedhead.lowering import shards  # noqa: F401  registers its ops
from fusedhead.lowering.plan.plan import plan
from fusedhead.lowering.plan.problem import LEAST_MEMORY, Problem

BF16 = torch.bfloat16
PLAIN = Problem(8192, 128256, 4096, BF16, "cuda", BF16, float8=True)
FLOAT8 = {"fusedhead.gradients": "float8", "fusedhead.strict": True}
N, D, V = 40, 32, 400


def said(problem: Problem, memory: int = 0, why: str = "") -> str:
    return cost.products_text(plan(problem, memory=memory), problem, memory, why)


def test_float8_products_are_said_with_their_error():
    assert said(PLAIN).startswith("dH and dW by float8 products (each term of the tail's sums errs by at most 13 %")
    e4m3 = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    error, normal = e4m3.diff() / 2, e4m3[:-1] >= 2**-6
    assert (1 + (error / e4m3[:-1])[normal].max()) ** 2 <= 1.13
    for largest, least, floor in ((448 * 2**6 / 2**0.5, 2**-20, 2**-24), (448, 2**-14, 2**-18)):
        assert 2**-6 / largest <= least  # below it numbers are not normal
        assert error[~normal].max() / largest <= floor


@pytest.mark.parametrize(
    ("problem", "memory", "why", "words"),
    [
        (PLAIN, LEAST_MEMORY, "", "the least memory is asked for"),
        (PLAIN, 300, "", "its windows hold too much"),
        (PLAIN._replace(transform=parse("mul:0.5")), 0, "", "its logits are not h wᵀ alone"),
        (PLAIN._replace(linear=False), 0, "", "its gradients are not computed in the forward sweep"),
        (PLAIN._replace(float8=False), 0, "its classes lie in shards", "its classes lie in shards"),
    ],
)
def test_exact_products_are_said_with_the_reason(problem, memory, why, words):
    assert said(problem, memory, why) == f"dH and dW exact ({words})"


def call(op: Any, transposed: bool = False) -> Node:
    graph = Graph()
    h, w = (graph.placeholder(name) for name in "hw")
    with FakeTensorMode():
        h.meta["example_value"] = torch.empty(N, D)
        w.meta["example_value"] = torch.empty(D, V).t() if transposed else torch.empty(V, D)
    return graph.call_function(op, (h, w))


def test_what_no_kernel_takes_is_known_before_the_plan(monkeypatch):
    ops = torch.ops.fusedhead
    head, in_shards = ops.head_stats.default, ops.shard_stats.default
    assert cost.why_no_float8(call(head)).startswith("no GPU with kernels for float8 products, or")

    class Serves:
        @staticmethod
        def float8_serves(head: object) -> bool:
            return True

    monkeypatch.setattr(cost, "engine_for", lambda dtype, device: Serves)
    assert cost.why_no_float8(call(head)) == ""
    assert cost.why_no_float8(call(head, transposed=True)) == "w or h is not contiguous along the hidden size"
    assert cost.why_no_float8(call(in_shards)) == "its classes lie in shards"


def mean(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t(), y)


def divergence(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    teacher = (h.detach() @ w.detach().flip(0).t()).softmax(-1)
    return F.kl_div((h @ w.t()).log_softmax(-1), teacher, reduction="batchmean")


@pytest.mark.parametrize("program", [mean, divergence])
def test_where_float8_does_not_serve_results_are_those_of_exact_products_and_a_sentence_says_so(program):
    h, w = (torch.randn(m, D, requires_grad=True) for m in (N, V))
    y = torch.randint(0, V, (N,))
    found = []
    for options in (FLOAT8, FLOAT8 | {"fusedhead.gradients": "exact"}):
        torch._dynamo.reset()
        loss = torch.compile(program, backend="fusedhead", options=options)(h, w, y)
        found.append((loss, *torch.autograd.grad(loss, (h, w))))
    assert all(map(torch.equal, *found))
    torch._dynamo.reset()
    assert "dH and dW exact (" in str(fusedhead.explain(program, options=FLOAT8)(h, w, y))

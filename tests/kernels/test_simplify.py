"""Algebra on a window's graph changes roundings only: values, NaN, masked classes, ignored labels stay as they were."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fusedhead.kernels.tokenwise.compilation import above_autograd_keys
from fusedhead.kernels.tokenwise.engine import _vjp
from fusedhead.kernels.tokenwise.program import read
from fusedhead.kernels.tokenwise.simplify import simplify

N, V = 7, 33
aten = torch.ops.aten
STUDENT, TEACHER = "head(r0, t1, t2, r3, '{student}', float32)", "head(r4, t5, t6, r7, '{teacher}', float32)"
LINES = {  # the last line is the result
    "forward": """
v2 = log_softmax.int(v0, 1, float32); v3 = softmax.int(v1, 1, float32); v4 = xlogy.Tensor(v3, v3)
v5 = mul.Tensor(v3, v2); v6 = sub.Tensor(v4, v5); v7 = sum.dim_IntList(v6, [1])""",
    "reverse": """
v2 = log_softmax.int(v0, 1, float32); v3 = log_softmax.int(v1, -1, float32); v4 = exp.default(v2)
v5 = sub.Tensor(v2, v3); v6 = mul.Tensor(v4, v5); v7 = sum.dim_IntList(v6, [1])""",
    "mixture": """
v2 = log_softmax.int(v0, 1, float32); v3 = log_softmax.int(v1, 1, float32)
v4 = sub.Tensor(v2, 0.7); v5 = sub.Tensor(v3, 0.7); v6 = stack.default([v4, v5], 1); v7 = logsumexp.default(v6, [1])
v8 = exp.default(v2); v9 = sub.Tensor(v2, v7); v10 = mul.Tensor(v8, v9); v11 = sum.dim_IntList(v10, [1])""",
    "loss": """
v2 = cross_entropy_loss.default(v0, r8, None, reduction=0, ignore_index=-100)
v3 = softmax.int(v1, 1, float32); v4 = div.Tensor(v0, 3); v5 = log_softmax.int(v4, 1, float32)
v6 = mul.Tensor(v3, v5); v7 = sum.dim_IntList(v6, [1]); v8 = mul.Tensor(v7, 0.25); v9 = sub.Tensor(v2, v8)""",
    "weighted": """
v2 = log_softmax.int(v0, 1, float32); v3 = softmax.int(v1, 1, float32); v4 = mul.Tensor(v3, r9)
v5 = mul.Tensor(v4, v2); v6 = sum.dim_IntList(v5, [1])""",
    "gathered": """
v2 = log_softmax.int(v0, 1, float32); v3 = exp.default(v1); v4 = topk.default(v1, 5, 1); v5 = item(v4, 1)
v6 = gather.default(v2, 1, v5); v7 = mul.Tensor(v6, r9); v8 = sum.dim_IntList(v7, [1])""",
    "entropy": """
v2 = softmax.int(v0, 1, float32); v3 = xlogy.Tensor(v2, v2); v4 = mul.Tensor(v1, v2); v5 = add.Tensor(v3, v4)
v6 = sum.dim_IntList(v5, [1])""",
}
SUMS = {"reverse": 2, "mixture": 2, "gathered": 2}  # one is the result's; the gathered numbers alone are summed again
PROGRAMS = {
    name: f"v0 = {STUDENT}; v1 = {TEACHER}{lines}; return {lines.split()[-4]}".replace("\n", "; ")
    for name, lines in LINES.items()
}


def inputs(z: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    """Of `_vjp`: both heads' operands, which are not read, labels, a factor a row; products; the upstream gradient."""
    torch.manual_seed(1)
    head = [torch.empty(N, 2), torch.empty(V, 2), torch.empty(0, V), torch.empty(N, 0)]
    return [*head, *head, y, torch.rand(N, 1), z, t, torch.rand(N)]


def graph_of(name: str, given: list[Tensor], scales: tuple[float, float], dtype: str = "float32") -> GraphModule:
    student, teacher = (f"mul:{scale}" for scale in scales)
    program = read(PROGRAMS[name].format(student=student, teacher=teacher).replace("float32", dtype))
    live = tuple(line.args[0].at == 0 for line in program.heads)
    vjp = _vjp(program, 10, (True,), (), live, True)
    return above_autograd_keys(lambda: make_fx(lambda *flat: vjp(list(flat)), tracing_mode="fake")(*given))


def wide(inputs: list[Tensor]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in inputs]


def values(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    z, t = (torch.randn(N, V) * 6 for _ in range(2))
    y = torch.randint(0, V, (N,))
    y[2] = -100
    return z, t, y


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 0.3)], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_roundings_of_float32_are_as_large_as_those_of_the_graph_before(name: str, scales: tuple[float, float]) -> None:
    """Root mean square over seeds. Both start from exact logits, so that only the ops on them round."""
    given = inputs(*values())
    simplified, before = graph_of(name, given, scales), graph_of(name, given, scales)
    truth = graph_of(name, wide(given), scales, "float64")
    assert simplify(simplified) == []
    squares = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(30):
        given = inputs(*values(seed))
        right = truth(*wide(given))
        for row, graph in zip(squares, (simplified, before)):
            row += torch.stack([(x - r).norm() ** 2 for x, r in zip(graph(*given), right)])
    assert (squares[0] <= 1.3**2 * squares[1]).all(), (squares[0] / squares[1]).sqrt()


MADE_OF_OTHERS = [
    aten._softmax, aten._log_softmax, aten._softmax_backward_data, aten._log_softmax_backward_data, aten.logsumexp,
]  # fmt: skip
ROUND = {aten.add, aten.sub, aten.mul, aten.div, aten.exp, aten.log, aten.xlogy, aten.sum}
DRAWS = 8


class WithRoundings(Interpreter):
    """A graph of ``DRAWS`` times N rows in float64: each value is rounded at random, as float32 would.

    By a part of it, or underflow; the same rows differently in each draw. Equal numbers are rounded alike, which ties
    of large logits need. Softmaxes and their gradients are the ops that they are made of, since those round.
    """

    def __init__(self, graph: GraphModule, given: list[Tensor]) -> None:
        super().__init__(make_fx(graph, get_decompositions(MADE_OF_OTHERS), "fake")(*given))
        self.phase = 0

    def draws(self, given: list[Tensor]) -> list[Tensor]:
        """The results, [DRAWS, N, ...] each: the same for the same inputs."""
        self.phase = 0
        return [x.unflatten(0, (DRAWS, N)) for x in self.run(*given)]

    def run_node(self, n: Node) -> Any:
        x = super().run_node(n)
        if getattr(n.target, "overloadpacket", None) not in ROUND:
            return x
        self.phase += DRAWS
        phases = self.phase + torch.arange(DRAWS).repeat_interleave(N).view(-1, *[1] * (x.dim() - 1))
        moved = x + (1e9 * x.frexp().mantissa + phases).sin() * (2.0**-24 * x.abs() + 2.0**-150)
        return torch.where(x.isfinite() & (moved.sign() == x.sign()), moved, x)


def for_draws(given: list[Tensor]) -> list[Tensor]:
    return [x.repeat(DRAWS, *[1] * (x.dim() - 1)) if len(x) == N else x for x in wide(given)]


def agree(got: Tensor, before: Tensor, truth: Tensor, rounded: Tensor) -> bool:
    """NaN and infinities where the graph before has them, and elsewhere its error, or what roundings make of it.

    ``rounded`` are results of the graph before with other roundings. Where large terms cancel, each is noise, and one
    number of the graph before may be right by luck.
    """
    noise = (rounded - truth).abs().amax(0)
    near = (got.double() - truth).abs() <= (before.double() - truth).abs() + 8 * noise
    same = (got == before) | (got.isnan() & before.isnan())
    return bool(torch.where(before.isfinite(), near & got.isfinite(), same).all())


class Graphs(NamedTuple):
    simplified: GraphModule
    before: GraphModule
    truth: GraphModule
    rounded: WithRoundings


@cache
def graphs(name: str, scales: tuple[float, float]) -> Graphs:
    given = inputs(*values())
    simplified, before = graph_of(name, given, scales), graph_of(name, given, scales)
    simplify(simplified)
    truth, of_draws = (graph_of(name, x, scales, "float64") for x in (wide(given), for_draws(given)))
    return Graphs(simplified, before, truth, WithRoundings(of_draws, for_draws(given)))


class Odd(NamedTuple):
    """A value in one row of the student's logits (0), the teacher's (1) or both, at one column or all."""

    of: tuple[int, ...]
    row: int
    columns: int | slice
    value: float


# Few rows and columns, so that odd values meet: what a maximum is for needs both heads odd at one place.
ODD = st.builds(
    Odd,
    st.sampled_from([(0,), (1,), (0, 1)]),
    st.integers(0, 2),
    st.sampled_from([0, 1, 2, slice(None)]),
    st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, 200.0, -200.0]),
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(PROGRAMS)), st.lists(ODD, max_size=5), st.sampled_from([(1.0, 1.0), (0.5, 2.0)]))
@example("reverse", [Odd((1,), 0, 0, 3e38)], (1.0, 1.0))  # gradients are the noise of terms of 3e38
@example("mixture", [Odd((0, 1), 1, 2, -math.inf)], (1.0, 1.0))  # a class that neither head has
@example("mixture", [Odd((0, 1), 1, 2, 200.0)], (1.0, 1.0))  # all other classes are exp(-200) in both heads
@example("forward", [Odd((1,), 0, 0, -math.inf)], (1.0, 1.0))  # 0 log 0
def test_what_is_not_finite_stays_so(name: str, odd: list[Odd], scales: tuple[float, float]) -> None:
    z, t, y = values()
    for each in odd:
        for which in each.of:
            (z, t)[which][each.row, each.columns] = each.value
    given, of = inputs(z, t, y), graphs(name, scales)
    results = of.simplified(*given), of.before(*given), of.truth(*wide(given)), of.rounded.draws(for_draws(given))
    for got, before, truth, rounded in zip(*results):
        assert agree(got, before, truth, rounded), (got, before, truth)


@pytest.mark.parametrize("name", PROGRAMS)
def test_row_statistics_may_be_given(name: str) -> None:
    z, t, y = values()
    given = inputs(z, t, y)
    graph = graph_of(name, given, (0.5, 0.25))
    before, inputs_before = graph(*given), len(given)
    for at, scale in simplify(graph, (10, 11)):
        x = given[at] * scale
        top = x.amax(1, True)
        given += [top, (x - top).exp().sum(1, True).log()]
    assert len(given) > inputs_before
    assert not graph.graph.find_nodes(op="call_function", target=aten.amax.default)
    sums = len(graph.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList))
    assert sums == SUMS.get(name, 1)
    for a, b in zip(graph(*given), before):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-5)


def test_a_divergence_to_a_frozen_teacher_needs_one_sum_besides_the_normalizers() -> None:
    given = inputs(*values())
    graph = graph_of("forward", given, (1.0, 1.0))
    simplify(graph, (10, 11))
    assert len(graph.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)) == 1  # the loss itself


def test_a_factor_that_is_no_number_or_negative_is_left_in_the_graph() -> None:
    given = inputs(*values())
    assert simplify(graph_of("forward", given, (-1.0, 1.0)), (10, 11)) == [(11, 1.0)]


def test_logits_that_are_rounded_to_the_dtype_of_their_product_are_the_product() -> None:
    """As autocast and bfloat16 heads write it; the row statistics are found behind such casts."""
    given = [x.bfloat16() if at in (10, 11) else x for at, x in enumerate(inputs(*values()))]
    student, teacher = (f"round:bfloat16 mul:{scale}" for scale in (0.5, 0.25))
    program = read(PROGRAMS["forward"].format(student=student, teacher=teacher))
    vjp = _vjp(program, 10, (True,), (), (True, False), True)
    graph = above_autograd_keys(lambda: make_fx(lambda *flat: vjp(list(flat)), tracing_mode="fake")(*given))
    before = graph(*given)
    assert sorted(simplify(graph, (10, 11))) == [(10, 0.5), (11, 0.25)]
    for at, scale in [(10, 0.5), (11, 0.25)]:
        x = given[at].float() * scale
        given += [x.amax(1, True), (x - x.amax(1, True)).exp().sum(1, True).log()]
    for a, b in zip(graph(*given), before):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-2 if a.dtype == torch.bfloat16 else 2e-5)

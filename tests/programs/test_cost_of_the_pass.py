"""What the pass does to a graph, counted: it reads around the heads, and the rest of a model once or twice.

Counts, not milliseconds, so that a busy machine fails nothing. `fx` and fake tensors take the time, by node and trace.
"""

from __future__ import annotations

import cProfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedhead import backend
from fusedhead.graph import dry_run, effects, tracing
from fusedhead.ir.builder import Emit
from fusedhead.options import Options
from fusedhead.rewrite import tail_gradient
from tests.eager_stack import Rewritten

D, V = 16, 64


class Decoder(nn.Module):
    """A language model with so many layers of ten nodes and more."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D), nn.Dropout(0.0))
            for _ in range(layers)
        )
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x)
        for layer in self.layers:
            h = h + torch.cat([layer(h) * 0.5, layer(h)], -1).unflatten(-1, (2, D)).sum(-2)
        z = self.head(h)
        return F.cross_entropy(z.view(-1, V), y.view(-1)), z


def counted(layers: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the pass runs, traces and emits nodes of a model of so many layers."""
    count: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name, modules in {
            "ask": (effects,),
            "run": (dry_run,),
            "fake_mode": (dry_run,),
            "trace": (tracing,),
            "make_fx": (tracing, tail_gradient),
        }.items():
            for module in modules:
                if hasattr(module, name):
                    patch.setattr(module, name, counting(name, getattr(module, name)))
        patch.setattr(Emit, "__call__", counting("emit", Emit.__call__))

        def compile_graph(gm: Any, example_inputs: Any) -> Any:
            count["nodes"] += len(gm.graph.nodes)
            _, report, _ = backend.run_pass(gm, Options(min_logits=0), texts=False)
            count["heads"] += sum(head.fused for head in report.heads)
            return gm.forward

        torch.compiler.reset()
        x = torch.randint(0, V, (2, 8))
        torch.compile(Decoder(layers), backend=compile_graph)(x, x)
    return count


def test_the_pieces_of_a_loop_share_their_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(F.linear(a, w), b) for a, b in zip(h.split(2), y.split(2))]).sum()

    result, once = [], tracing.trace
    monkeypatch.setattr(tracing, "trace", lambda node: result.append(node) or once(node))
    h, w = torch.randn(16, D, requires_grad=True), nn.Parameter(torch.randn(V, D))
    y = torch.randint(0, V, (16,))
    rewritten = Rewritten(program)
    torch.testing.assert_close(rewritten(h, w, y), program(h, w, y))
    assert all(head.fused for head in rewritten.report.heads)
    assert len(result) <= 4


def test_layers_are_neither_run_nor_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "MOST_FACTS", 0)  # none are kept
    few, many = counted(1, monkeypatch), counted(9, monkeypatch)
    assert few["heads"] == many["heads"] == 1
    assert many["nodes"] > 4 * few["nodes"]
    assert few["trace"] == many["trace"] == 3  # the product, a view, the loss
    assert few["make_fx"] == many["make_fx"] == 4  # ... and the gradient of the tail
    assert few["emit"] == many["emit"] < 40
    assert few["ask"] == many["ask"] < 20
    assert few["run"] == many["run"] < 10


def test_what_a_call_of_pytorch_does_is_found_out_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "FACTS", {})
    first, second = counted(1, monkeypatch), counted(1, monkeypatch)
    assert first["ask"] == second["ask"]
    assert first["run"] > second["run"] == 0


def test_no_call_of_a_plain_model_is_tried_on_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take ten times as long as tensors on "meta": the most of what a process's first pass took longer."""
    monkeypatch.setattr(dry_run, "FACTS", {})
    result = counted(1, monkeypatch)
    assert result["run"] > 0
    assert result["fake_mode"] == 0


def rows_of_one_product(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    return torch.stack([F.cross_entropy(z[i : i + 2], y[i : i + 2]) for i in range(0, len(h), 2)]).mean()


def in_place(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    total = h.new_zeros(())
    for a, b in zip(h.split(2), y.split(2)):
        z = F.linear(a, w)
        z.div_(2)
        total += F.cross_entropy(z, b, reduction="sum")
    return total


def with_z_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    total = 0.0
    for a, b in zip(h.split(2), y.split(2)):
        z = F.linear(a, w)
        total = total + F.cross_entropy(z, b, reduction="sum") + 1e-3 * z.logsumexp(-1).square().sum()
    return total


def token_by_token(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    total = 0.0
    for a, b in zip(h.split(2), y.split(2)):
        lp = F.linear(a, w).log_softmax(-1)
        total = total + F.nll_loss((1 - lp.exp()) ** 2 * lp, b)
    return total


OWN = str(Path(backend.__file__).parent)


def calls_of(program: Callable[..., Tensor], count: int) -> int:
    """How often the pass calls its own functions for a loop of so many steps."""
    calls: list[int] = []

    def compile_graph(gm: Any, example_inputs: Any) -> Any:
        profile = cProfile.Profile()
        _, report, _ = profile.runcall(backend.run_pass, gm, Options(min_logits=0), texts=False)
        assert report.heads
        assert all(head.fused for head in report.heads)
        codes = ((c.callcount, getattr(c.code, "co_filename", "")) for c in profile.getstats())
        calls.append(sum(count for count, file in codes if file.startswith(OWN)))
        return gm.forward

    torch.compiler.reset()
    h, w = torch.randn(2 * count, D, requires_grad=True), nn.Parameter(torch.randn(V, D))
    torch.compile(program, backend=compile_graph)(h, w, torch.randint(0, V, (2 * count,)))
    (result,) = calls
    return result


# heads with a sweep each look along the sums of all losses after theirs, a few calls a loss
@pytest.mark.parametrize(
    ("program", "slack"), [(rows_of_one_product, 1.01), (in_place, 1.01), (with_z_loss, 1.15), (token_by_token, 1.15)]
)
def test_a_loop_twice_as_long_is_twice_the_work(program: Callable[..., Tensor], slack: float) -> None:
    _, few, more, many = (calls_of(program, count) for count in (2, 4, 12, 20))  # the first finds out what calls do
    assert many - more <= slack * (more - few)

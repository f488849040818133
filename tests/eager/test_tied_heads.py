"""Heads that are no layers: a model's own products with its embedding hand out deferred logits, in its methods."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedhead
from fusedhead.eager import tied_heads
from fusedhead.report.summary import Summary
from fusedhead.run.enable import torchtune_ties_heads
from tests.eager.models import D, Functions, V, batch, same, step, under_a_mode
from tests.eager.tied import PRODUCTS, Tied
from tests.eager_stack import backend


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    for module in list(tied_heads.MODELS):
        del tied_heads.MODELS[module]
    for (cls, name), ours in list(tied_heads._methods.items()):
        if vars(cls).get(name) is ours:
            setattr(cls, name, inspect.unwrap(ours))
    tied_heads._methods.clear()


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_loss_of_a_product_with_the_embedding_has_the_numbers_of_eager_code(product: str, summary: Summary) -> None:
    model, (x, y) = Tied(product), batch()
    exact, plain = step(copy.deepcopy(model).double(), x, y), step(model, x, y)
    assert fusedhead.defer(model) is model
    same(step(model, x, y), plain, exact)
    (head,) = summary.heads()
    assert (head.fused, head.module, head.logits) == (True, "embed", "deferred")
    assert (head.run.answered.value, head.run.built.total) == (1, 0)


def test_a_method_that_is_not_forward(summary: Summary) -> None:
    model, (x, y) = Tied(), batch()
    expected = model.calculate_loss(x, y)
    fusedhead.defer(model)
    torch.testing.assert_close(model.calculate_loss(x, y), expected)
    assert summary.heads()[0].run.answered.value == 1


class Sized(nn.Module):
    """A model whose products are with weights that are no parameters of it, or are not transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.square = nn.Embedding(V, D), nn.Parameter(torch.randn(D, V))

    def forward(self, h: Tensor) -> list[Tensor]:
        w = self.embed.weight
        return [
            h @ self.square, h @ (w * 2).T, F.linear(h, w[:1000]), h @ w.T[:, 24:], F.linear(h, w.detach()),
            h @ w.view(D, V), F.linear(h[0, 0], w),
        ]  # fmt: skip


def test_other_products_are_torchs_own() -> None:
    model, h = Sized(), torch.randn(4, 32, D)
    expected = model(h)
    fusedhead.defer(model)
    for actual, plain in zip(model(h), expected, strict=True):
        assert type(actual) is Tensor
        assert torch.equal(actual, plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_blocks_and_a_loss_that_are_compiled_have_the_same_graphs(summary: Summary) -> None:
    model, (x, y) = Tied("@ w.T"), batch()
    plain, exact = step(model, x, y), step(copy.deepcopy(model).double(), x, y)
    graphs: list[str] = []

    def count(gm: Any, inputs: Any) -> Any:
        graphs.append("\n".join(n.format_node() or "" for n in gm.graph.nodes))
        return gm.forward

    model.mix.compile(backend=count)
    model(x)
    torch.compiler.reset()
    fusedhead.defer(model)
    loss = torch.compile(lambda z, y: F.cross_entropy(z.float(), y), backend=backend(lambda report: None))
    same(step(model, x, y, loss), plain, exact)
    assert graphs[0] == graphs[1]
    assert len(graphs) == 2
    assert summary.heads()[0].run.passed.value == 1


def test_a_model_that_is_compiled_whole_has_the_same_graph() -> None:
    seen: list[str] = []

    def texts(gm: Any, inputs: Any) -> Any:
        seen.append(" ".join(f"{n.op} {n.target}" for n in gm.graph.nodes if n.op != "placeholder"))
        return gm.forward

    model, (x, _) = Tied(), batch()
    torch.compile(model, backend=texts, fullgraph=True)(x)
    torch.compiler.reset()
    fusedhead.defer(model)
    torch.compile(model, backend=texts, fullgraph=True)(x)
    assert seen[0] == seen[1]


PLAIN: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "a function mode": under_a_mode(Functions),
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "checkpointing": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "jit.trace": lambda model, x: torch.jit.trace(model, x)(x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model)(x) + 0,
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module()(x),
    "a copy": lambda model, x: copy.deepcopy(model)(x),
    "a pickle": lambda model, x: pickle.loads(pickle.dumps(model))(x),
}


@pytest.mark.parametrize("how", PLAIN)
def test_what_records_or_copies_a_model_gets_plain_products(how: str) -> None:
    model, (x, _) = Tied(), batch()
    expected = model(x)
    fusedhead.defer(model)
    actual = PLAIN[how](model, x)
    assert type(actual) is Tensor or how == "fx"
    torch.testing.assert_close(actual, expected)


class GivenAWeight(nn.Module):
    """torchtune's layer of a head that is tied to an embedding."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


def test_a_layer_that_is_given_an_embeddings_weight_as_torchtunes(summary: Summary) -> None:
    package = ModuleType("torchtune.modules.tied_linear")
    vars(package)["Linear"] = GivenAWeight
    original, (x, y) = GivenAWeight.forward, batch()
    fusedhead.enable()
    undo = torchtune_ties_heads(package)
    try:
        embedding, layer = nn.Embedding(V, D), GivenAWeight()
        logits = layer(embedding(x), embedding.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        graphs: list[str] = []

        def texts(gm: Any, inputs: Any) -> Any:
            graphs.append(" ".join(f"{n.op} {n.target}" for n in gm.graph.nodes if n.op != "placeholder"))
            return gm.forward

        torch.compile(layer, backend=texts, fullgraph=True)(torch.randn(4, 32, D), embedding.weight)
        assert graphs == [f"call_function {F.linear} output output"]
    finally:
        undo()
        fusedhead.disable()
    assert GivenAWeight.forward is original
    torch.testing.assert_close(
        loss, F.cross_entropy(F.linear(embedding(x), embedding.weight).flatten(0, 1), y.flatten())
    )
    assert summary.heads()[0].run.answered.value == 1

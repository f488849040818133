"""Eager heads among modes, transforms, tracers and compiled frames: what records or changes calls gets plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedhead
from fusedhead.deferred.tensor import DeferredLogits
from fusedhead.report.summary import Summary
from tests.eager.models import D, Functions, Model, Ops, batch, under_a_mode

PLAIN: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "a function mode": under_a_mode(Functions),
    "a dispatch mode": under_a_mode(Ops),
    "no torch function": under_a_mode(torch._C.DisableTorchFunctionSubclass),
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "checkpointing": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "jit.trace": lambda model, x: torch.jit.trace(model, x)(x),
    "jit.script": lambda model, x: torch.jit.script(model)(x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model)(x) + 0,
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module()(x),
}


@pytest.mark.parametrize("how", PLAIN)
def test_what_records_or_changes_calls_gets_plain_ones(how: str) -> None:
    model, (x, _) = Model(), batch()
    expected = model(x)
    fusedhead.defer(model)
    actual = PLAIN[how](model, x)
    assert type(actual) is Tensor or how == "fx"
    torch.testing.assert_close(actual, expected)


def test_a_default_device_is_no_mode_that_matters() -> None:
    model, (x, _) = Model(), batch()
    fusedhead.defer(model)
    with torch.device("cpu"):
        assert type(model(x)) is DeferredLogits


def test_dynamo_sees_torchs_own_layer() -> None:
    seen: list[str] = []

    def texts(gm: Any, inputs: Any) -> Any:
        seen.append("\n".join(f"{n.format_node()} {n.meta.get('stack_trace')}" for n in gm.graph.nodes))
        return gm.forward

    model, (x, _) = Model(True), batch()
    torch.compile(model, backend=texts, fullgraph=True)(x)
    torch.compiler.reset()
    fusedhead.defer(model)
    torch.compile(model, backend=texts, fullgraph=True)(x)
    assert seen[0] == seen[1]


def test_below_a_frame_that_dynamo_skips_nothing_of_ours_is_compiled(summary: Summary) -> None:
    model, h = Model(), torch.randn(64, D)
    fusedhead.defer(model)
    graphs: list[Any] = []

    def count(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    @torch.compiler.disable(recursive=False)
    def skipped(h: Tensor) -> Tensor:
        return model.lm_head(h)

    logits = torch.compile(lambda h: skipped(h), backend=count)(h)
    assert type(logits) is DeferredLogits
    torch.testing.assert_close(torch.logsumexp(logits, -1), torch.logsumexp(F.linear(h, model.lm_head.weight), -1))
    assert graphs == []
    assert summary.graphs == 1

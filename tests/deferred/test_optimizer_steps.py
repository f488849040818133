"""Stale logits: what is written to weights, or taken away, between the forward and the read."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import torch.optim.optimizer as optimizers
from torch import nn

from fusedhead.deferred.graph_outputs import StaleLogits
from tests.deferred.heads import (
    B,
    D,
    Model,
    T,
    V,
    deferring,
    is_deferred,
    tokens,
)  # fmt: skip


@pytest.mark.parametrize("foreach", [True, False])
def test_reading_after_the_optimizer_step_is_an_error_with_the_remedy(model: Model, foreach: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    z = deferring(model)(tokens())
    F.cross_entropy(z.view(-1, V), tokens().view(-1)).backward()
    optimizer.step()
    with pytest.raises(StaleLogits, match=r"lm_head.weight.*changed in place.*before optimizer.step\(\)"):
        z.sum()
    with pytest.raises(StaleLogits, match="FUSEDHEAD_LOGITS=eager"):
        F.cross_entropy(z.view(-1, V), tokens().view(-1))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_step_of_a_fused_optimizer_is_noticed_though_it_leaves_no_version_behind(
    model: Model, optimizer: Any
) -> None:
    fused = optimizer([model.lm_head.weight], lr=0.1, fused=True)
    others = optimizer([torch.ones(1)], lr=0.1, fused=True)
    z = deferring(model)(tokens())
    F.cross_entropy(z.view(-1, V), tokens().view(-1)).backward()
    others.step()
    assert is_deferred(z.detach())
    assert z.detach().sum().isfinite()
    again = deferring(model)(tokens())
    fused.step()
    with pytest.raises(StaleLogits, match=r"lm_head.weight.*stepped by an optimizer.*before optimizer.step\(\)"):
        again.sum()


def test_a_step_on_other_names_of_the_weights_memory_is_noticed(model: Model) -> None:
    alias = nn.Parameter(model.lm_head.weight.detach())
    alias.grad = torch.ones_like(alias)
    z = deferring(model)(tokens())
    torch.optim.SGD([alias], lr=0.1, fused=True).step()
    with pytest.raises(StaleLogits, match=r"lm_head.weight.*stepped by an optimizer"):
        z.sum()


def test_noticing_steps_does_not_get_into_compiled_optimizers(model: Model) -> None:
    def breaks() -> dict[str, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        weight = nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        torch.compile(torch.optim.SGD([weight], lr=0.5).step, backend="eager")()
        assert torch.equal(weight, torch.full((3,), 0.5))
        return dict(torch._dynamo.utils.counters["graph_break"])

    deferring(model)(tokens())  # somebody asks from here on
    assert optimizers._global_optimizer_post_hooks
    with_hook = breaks()
    with patch.dict(optimizers._global_optimizer_post_hooks, clear=True):
        assert breaks() == with_hook


def test_logits_that_were_read_before_the_step_stay_readable(model: Model) -> None:
    z = deferring(model)(tokens())
    before = z.sin()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert torch.equal(z.sin(), before)


def test_memory_that_was_taken_away_is_never_read(model: Model) -> None:
    z = deferring(model)(tokens())
    model.lm_head.weight.data.untyped_storage().resize_(0)
    with pytest.raises(StaleLogits, match=r"lm_head.weight.*freed or moved"):
        z.sum()


def test_a_weight_that_was_replaced_leaves_the_logits_what_they_were(model: Model) -> None:
    x = tokens()
    z, real = deferring(model)(x), model(x)
    model.lm_head.weight.data = torch.randn(V, D)
    assert torch.equal(z + 0, real)


def test_the_next_forward_changes_nothing(model: Model) -> None:
    compiled, x, other = deferring(model), tokens(), tokens()
    z = compiled(x)
    later = compiled(other)
    torch.testing.assert_close(z + 0, model(x))
    torch.testing.assert_close(later + 0, model(other))


X = torch.arange(B * T).reshape(B, T)


def test_hidden_states_in_memory_that_is_used_again_are_copied(model: Model) -> None:
    """CUDA graphs hand out the same memory at every run."""
    from fusedhead.deferred.graph_outputs import deferring as finishing
    from fusedhead.graph.recipes import Recipe

    recipes: list[tuple[Recipe, Any]] = []

    def compile_with_static_memory(gm: Any, inputs: Any) -> Any:
        from fusedhead.backend import run_pass
        from fusedhead.options import Options

        working, _, wrap = run_pass(gm, Options(logits="deferred", min_logits=0))
        finish = finishing(0, True)
        return wrap(working.forward, lambda r, s: recipes.append((r, s)) or finish(r, s))

    z = torch.compile(model, backend=compile_with_static_memory)(X)
    expected = model(X).detach()
    ((_, sources),) = recipes
    with torch.no_grad():
        next(s for s in sources if s.shape == (B, T, D)).fill_(float("nan"))
    torch.testing.assert_close(z.detach() + 0, expected)

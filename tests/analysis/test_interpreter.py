"""The interpreter: where logits end, leave the graph or escape, and what a write to them makes of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.analysis.interpreter import heads_of
from fusedhead.analysis.reasons import Untraced
from fusedhead.analysis.site import Site
from fusedhead.graph.nodes import name_of
from fusedhead.ir.terminal import Kind
from tests.analysis.bodies import body_of, plain_reading
from tests.programs.claims import D, V, hidden, labels, weight


def site_of(program: Callable[..., Any]) -> Site:
    (site,) = plain_reading(body_of(program, hidden(6, D), weight(), labels(6))).sites
    return site


def test_a_loss_is_a_terminal_and_the_nodes_before_it_are_followed() -> None:
    site = site_of(lambda h, w, y: F.cross_entropy(F.linear(h, w).float() * 2, y))
    assert [(name_of(node), terminal.kind) for node, terminal in site.terminals] == [("cross_entropy", Kind.LOSS)]
    assert [name_of(node) for node in site.followed] == ["linear", "float", "mul"]
    assert site.outputs == site.escapes == site.overwritten == []


def test_logits_that_the_graph_returns_are_outputs() -> None:
    site = site_of(lambda h, w, y: ((z := F.linear(h, w)), F.cross_entropy(z, y)))
    assert site.outputs == [site.head.node]


def test_a_use_that_no_rule_reads_escapes_at_its_node() -> None:
    site = site_of(lambda h, w, y: F.cross_entropy(F.linear(h, w).cumsum(0), y))
    (escape,) = site.escapes
    assert escape.node is not None
    assert name_of(escape.node) == "cumsum"
    assert "aten.cumsum.default runs over tokens" in str(escape)


def test_a_name_that_is_written_to_has_the_new_value() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        z.mul_(2)
        return F.cross_entropy(z, y)

    site = site_of(program)
    ((_, terminal),) = site.terminals
    assert site.overwritten == [site.head.node]
    assert len(terminal.logits.steps) == 1
    assert not site.escapes


def test_a_write_under_a_view_that_is_read_later_escapes() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        view = z.view(-1, V)
        z.mul_(2)
        return F.cross_entropy(view, y)

    assert [escape.reason for escape in site_of(program).escapes] == [Untraced.HAS_A_VIEW]


def test_logits_may_be_read_token_by_token_from_the_start() -> None:
    body = body_of(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), hidden(6, D), weight(), labels(6))
    reading = plain_reading(body, tokenwise_only=body.starts)
    assert [site.terminals for site in reading.sites] == [[]]
    assert "cross_entropy" in {name_of(node) for node in reading.tokenwise}


def test_a_product_without_a_rule_is_noted_with_its_reason() -> None:
    h, w = hidden(2, 6, D), torch.randn(2, V, D)
    body = body_of(lambda h, w, y: F.cross_entropy((h @ w.mT).view(-1, V), y), h, w, labels(12))
    reading = plain_reading(body)
    assert reading.sites == []
    assert reading.no_rule.keys() == body.starts


def test_the_heads_of_values_are_those_of_their_logits_and_terminals() -> None:
    body = body_of(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), hidden(6, D), weight(), labels(6))
    reading = plain_reading(body)
    (site,) = reading.sites
    assert heads_of([reading.values[site.head.node]]) == heads_of(site.terminals[0][1]) == {site.head}
    assert heads_of([1, None, "text"]) == set()

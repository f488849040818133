"""The operands of a head's op: rows as the program picks them, vectors in float32, empty tensors for what is absent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.analysis.site import Site
from fusedhead.graph.nodes import fake
from fusedhead.rewrite.operands import emit_operands, joined_operands
from fusedhead.rewrite.sweeps import SweepGroup
from tests.programs.claims import B, D, T, V, hidden, labels, weight
from tests.rewrite.sites import computed, emitting, site_in

H, W, Y, BIAS = hidden(), weight(), labels(), torch.randn(V)


def groups_of(*sites: Site) -> list[SweepGroup]:
    return [SweepGroup(list(site.terminals)) for site in sites]


def test_rows_and_labels_are_those_that_the_loss_reads() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)[:, :-1]
        return F.cross_entropy(z.reshape(-1, V), y[:, 1:].reshape(-1))

    body, site = site_in(program, H, W, Y)
    (group,) = groups_of(site)
    with emitting(body.graph) as emit:
        nodes = emit_operands(emit, group.logits, group.labels, group.weights)
    h, w, y, cols, rows, u = computed(body.graph, nodes, H, W, Y)
    assert torch.equal(h, H[:, :-1].reshape(-1, D))
    assert torch.equal(w, W)
    assert torch.equal(y, Y[:, 1:].reshape(-1, 1))
    n = B * (T - 1)
    assert (cols.shape, rows.shape, u.shape) == ((0, V), (0, n), (0,))


def test_vectors_along_classes_and_tokens_are_stacked_in_float32() -> None:
    def program(h: Tensor, w: Tensor, bias: Tensor, temperature: Tensor, y: Tensor) -> Tensor:
        z = (F.linear(h, w) + bias) / temperature[..., None]
        return F.cross_entropy(z.view(-1, V), y.view(-1))

    temperature = torch.rand(B, T) + 0.5
    body, site = site_in(program, H, W, BIAS, temperature, Y)
    (group,) = groups_of(site)
    with emitting(body.graph) as emit:
        nodes = emit_operands(emit, group.logits, group.labels)
    _, _, _, cols, rows, _ = computed(body.graph, nodes, H, W, BIAS, temperature, Y)
    assert torch.equal(cols, BIAS[None])
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, temperature.view(1, -1).reciprocal())


def test_detached_logits_have_detached_operands() -> None:
    def program(h: Tensor, w: Tensor) -> Tensor:
        return F.linear(h, w).detach().logsumexp(-1)

    body, site = site_in(program, H, W)
    with emitting(body.graph) as emit:
        h, w, *_ = emit_operands(emit, groups_of(site)[0].logits)
    assert not fake(h).requires_grad
    assert not fake(w).requires_grad


def test_a_part_of_the_vocabulary_reads_a_slice_of_the_weight() -> None:
    body, site = site_in(lambda h, w: F.linear(h, w)[..., 2:7].logsumexp(-1), H, W)
    with emitting(body.graph) as emit:
        h, w, *_ = emit_operands(emit, groups_of(site)[0].logits)
    assert torch.equal(computed(body.graph, [w], H, W)[0], W[2:7])
    assert fake(h).shape == (B * T, D)


def test_groups_that_differ_in_their_rows_are_concatenated() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z[:, 0], y[:, 0]) + F.cross_entropy(z[:, 1:].reshape(-1, V), y[:, 1:].reshape(-1))

    body, site = site_in(program, H, W, Y)
    batch = [SweepGroup([terminal]) for terminal in site.terminals]
    with emitting(body.graph) as emit:
        nodes, counts = joined_operands(emit, batch)
    h, w, y, *_ = computed(body.graph, nodes, H, W, Y)
    assert counts == [B, B * (T - 1)]
    assert torch.equal(h, torch.cat((H[:, 0], H[:, 1:].reshape(-1, D))))
    assert torch.equal(y, torch.cat((Y[:, 0], Y[:, 1:].reshape(-1)))[:, None])
    assert torch.equal(w, W)

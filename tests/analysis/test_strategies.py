"""Interpretations of one graph: which teachers are followed too, and when one token program computes everything."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fusedhead.analysis.strategies import (
    heads_computed_twice,
    serves_all_of,
    teacher_heads,
    tokenwise_only,
    with_teacher_heads,
)
from fusedhead.graph.nodes import fake, name_of
from tests.analysis.bodies import body_of, plain_reading
from tests.programs.claims import D, hidden, labels, weight
from tests.rewrite.divergences import top_k_accuracy


def distances(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    """Squared distances to the logits of a teacher, which no loss names."""
    z, teacher = F.linear(h, w), F.linear(ht, wt).detach()
    return ((z - teacher) ** 2).sum(-1) + z.logsumexp(-1)


def test_a_teacher_is_a_projection_whose_logits_the_student_s_token_program_reads() -> None:
    body = body_of(distances, hidden(6, D), weight(), hidden(6, D).detach(), weight().detach())
    student = set(body.starts)
    plain = plain_reading(body)
    teachers = teacher_heads(plain)
    assert {name_of(node) for node in teachers} == {"linear"}
    assert not any(fake(node).requires_grad for node in teachers)
    reading = with_teacher_heads(body, plain)
    assert reading is not None
    assert body.starts == student | teachers
    assert serves_all_of(reading, body.starts)


def test_an_interpretation_does_not_serve_a_head_with_an_escape() -> None:
    body = body_of(lambda h, w, y: F.cross_entropy(F.linear(h, w).cumsum(0), y), hidden(6, D), weight(), labels(6))
    reading = plain_reading(body)
    assert not serves_all_of(reading, body.starts)
    assert serves_all_of(reading, ())


def test_statistics_beside_a_token_program_are_computed_in_it() -> None:
    body = body_of(top_k_accuracy, hidden(6, D), weight(), labels(6))
    plain = plain_reading(body)
    assert heads_computed_twice(plain) == body.starts
    reading = tokenwise_only(body, plain)
    assert reading is not None
    assert heads_computed_twice(reading) == set()
    assert not any(site.terminals for site in reading.sites)


def test_a_loss_alone_needs_no_other_interpretation() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    body = body_of(program, hidden(6, D), weight(), labels(6))
    plain = plain_reading(body)
    assert teacher_heads(plain) == heads_computed_twice(plain) == set()
    assert with_teacher_heads(body, plain) is None
    assert tokenwise_only(body, plain) is None

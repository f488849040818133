"""Every rule of the pass claims something about one op; every claim is checked on random logits, in every spelling.

The abstract value is turned into numbers by its definition, the op is run on them, and the result must be what the
rule said: shape, class dimension, numbers.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rules.checking import read
from rules.spellings import PROJECTIONS, SPELLINGS
from rules.states import World, draw_state, numbers
from rules.token_spellings import ROWWISE

from fusedhead.graph.reasons import Escape
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import Logits, Projection
from fusedhead.ir.tokenwise import HeadInput, TokenValue, inputs_of
from fusedhead.rules import RULES
from fusedhead.rules.table import TOKEN_RULES, Context
from fusedhead.rules.tokenwise import dispatch as tokenwise

aten = torch.ops.aten
EXAMPLES = int(os.environ.get("FUSEDHEAD_RULE_EXAMPLES", "2"))  # logits a spelling


def name(overload: Any) -> str:
    return str(overload).removeprefix("aten.")


def operands_of(draw: Any, world: World, z: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and constants that go with some logits, by the names the spellings use."""
    shape, d, rank = list(z.val.shape), z.class_dim, z.val.ndim
    vocab, rows = shape[d], [s for k, s in enumerate(shape) if k != d]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dims = [k for k in range(rank) if k != d]
    r = draw(st.sampled_from(dims)) if dims else 0
    k = draw(st.integers(-rank, rank - 1))
    a = draw(st.integers(0, 1))
    col = [vocab if i == d else 1 for i in range(rank)]
    row = [1 if i == d else draw(st.sampled_from([1, s])) for i, s in enumerate(shape)]
    idx = [draw(st.integers(1, 3)) if i == d else s for i, s in enumerate(shape)]
    y = torch.randint(0, vocab, rows, generator=generator)
    ignored = torch.where(torch.rand(rows, generator=generator) < 0.4, -1, y)
    tensors = {
        "col": torch.randn(col[d:] if draw(st.booleans()) else col, generator=generator),
        "row": torch.randn(row, generator=generator),
        "idx": torch.randint(0, vocab, idx, generator=generator),
        "yi": ignored,
        "y": y,
        "cw": torch.rand(vocab, generator=generator),
        "s": torch.randn((), generator=generator),
        "i": torch.randint(0, shape[r], (draw(st.integers(1, 3)),), generator=generator),
    }
    numbers_of_z = numbers(z, world)
    operands = {"z": world.plain("z", numbers_of_z)}
    operands |= {n: world.plain(n, t) for n, t in tensors.items()}
    split = [1, *shape] if draw(st.booleans()) else [*shape, 1]
    constants = {
        "d": draw(st.sampled_from([d, d - rank])),
        "p": d,
        "r": r,
        "k": k,
        "c": draw(st.sampled_from([0.5, -2.0, 3])),
        "v": vocab,
        "n": rank,
        "s0": shape[0],
        "sr": shape[r],
        "sk": shape[k],
        "a": a,
        "b": a + draw(st.integers(1, 2)),
        "shape": draw(st.sampled_from([split, shape, [-1, *shape[1:]], [*shape[:-1], -1]])),
    }
    return operands, constants


def dependent(text: str, operands: dict[str, Any]) -> dict[str, Any]:
    """The operands that a program names."""
    return {n: p for n, p in operands.items() if re.search(rf"(?<![\w.]){n}(?![\w(=])", text)}


@st.composite
def logits_and_operands(draw: Any) -> Any:
    world, z = draw(draw_state())
    return world, z, *operands_of(draw, world, z)


@st.composite
def projection_operands(draw: Any) -> Any:
    world = World()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    vocab, width = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    tensors = {
        "h": torch.randn(*rows, width, generator=generator),
        "wt": torch.randn(width, vocab, generator=generator),
        "w": torch.randn(vocab, width, generator=generator),
        "b": torch.randn(vocab, generator=generator),
    }
    return world, None, {n: world.plain(n, t) for n, t in tensors.items()}, {}


def check(overload: Any, text: str) -> Counter[str]:
    """Run one spelling on random logits; how often its rule was asked and read it, and why not."""
    outcome: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(projection_operands() if overload in PROJECTIONS else logits_and_operands())
    def claim_holds(drawn: Any) -> None:
        world, z, operands, constants = drawn
        program = text.format(**constants)
        try:
            asked, escape = read(program, dependent(program, operands), world, z)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            outcome[f"no program for these shapes: {error}"] += 1
            return
        outcome["asked"] += overload in asked
        outcome["read"] += overload in asked and not escape
        outcome[escape] += bool(escape)

    with torch.no_grad():
        claim_holds()
    return outcome


def check_all(overload: Any, texts: list[str]) -> None:
    """Every spelling is right, and some reach the rule and are read."""
    total: Counter[str] = Counter()
    for text in texts:
        total += check(overload, text)
    assert total["asked"], f"no spelling of {overload} reached its rule: {total}"
    assert total["read"], f"every spelling of {overload} was refused: {total}"


@pytest.mark.parametrize("overload", SPELLINGS, ids=name)
def test_a_rule_says_what_its_op_computes(overload: Any) -> None:
    check_all(overload, SPELLINGS[overload])


@pytest.mark.parametrize("overload", ROWWISE, ids=name)
def test_an_op_without_a_rule_is_right_token_by_token(overload: Any) -> None:
    check_all(overload, ROWWISE[overload])


# sizes are no tensors: a graph has them where they are symbols (tests/programs/test_dynamic_sizes.py)
SIZES = {aten.sym_size.int, aten.sym_size.default, aten.size.default}


@pytest.mark.parametrize("overload", [aten.slice.Tensor, aten.select.int, aten.index_select.default], ids=name)
def test_of_the_two_rules_of_a_pick_the_one_for_tokens_is_tried_first(overload: Any) -> None:
    """Picked tokens are computed alone: the pick moves to the head. A pick of classes stays in the program."""
    assert [rule.read.__name__ for rule in TOKEN_RULES[overload]] == [
        "picked_tokens",
        f"tail_{name(overload).split('.')[0]}",
    ]
    world = World()
    h, w = (world.plain(name, torch.ones(4, 2)) for name in "hw")
    i = world.plain("i", torch.ones(2, dtype=torch.int64))
    start = world.fake(torch.ones(4, 4))
    logits = Logits(Projection(world.graph.placeholder("z"), h, w, torch.float32), start, 1)
    x = TokenValue(Expr(aten.sinh.default, (HeadInput(logits),)), start, (False, True), frozenset({logits.head}))
    which = {aten.slice.Tensor: (1, 3), aten.select.int: (1,), aten.index_select.default: (i,)}[overload]
    for dim in (0, 1):
        fakes = [a.val if isinstance(a, Plain) else a for a in which]
        val = overload(start, dim, *fakes)
        one_token = overload is aten.select.int and dim == 0
        if one_token:
            with pytest.raises(Escape, match="one token is picked"):
                tokenwise.read_by_tokens(Context(None, val, overload, alone=val), x, dim, *which)
            continue
        value = tokenwise.read_by_tokens(Context(None, val, overload, alone=val), x, dim, *which)
        (head,), _ = inputs_of([value])
        assert bool(head.logits.row_steps) == (dim == 0)
        assert value.expr.op is (aten.sinh.default if dim == 0 else overload)


def test_every_op_that_is_read_token_by_token_has_a_property_test() -> None:
    missing = sorted(map(str, set(TOKEN_RULES) - set(ROWWISE) - SIZES))
    assert not missing, f"ops without a line in tests/rules/token_spellings.py: {', '.join(missing)}"


def test_every_rule_has_a_property_test() -> None:
    missing = sorted(map(str, set(RULES) - set(SPELLINGS)))
    assert not missing, f"rules without a line in tests/rules/spellings.py: {', '.join(missing)}"


def test_every_spelling_belongs_to_a_rule() -> None:
    unknown = sorted(map(str, set(SPELLINGS) - set(RULES)))
    assert not unknown, f"spellings of ops that no rule reads: {', '.join(unknown)}"

"""The cost model: bytes that a rank sends, seconds of a collective, where one arrangement passes another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import cost_model
from benchmarks.arrangements import ARRANGEMENTS, MERGES, Collective
from benchmarks.cost_model import RANKS, Chip, Link, Network
from benchmarks.shapes import Case

CASE = Case(8192, 4096, 128000)
FAST = Chip(flop=1e15, memory=4e12)
FREE = Link(latency=0.0, bandwidth=float("inf"))
NODE = Network(Link(5e-6, 300e9), Link(10e-6, 45e9), node=8)
KINDS = tuple(cost_model.SCHEDULES)


def bytes_a_token(name: str, ranks: int) -> float:
    return cost_model.predict(CASE, name, ranks, FAST, NODE).bytes_a_token


@pytest.mark.parametrize("ranks", [2, 4, 8, 1024])
def test_a_rank_sends_these_bytes_a_token(ranks: int) -> None:
    share, d = (ranks - 1) / ranks, CASE.hidden
    # three numbers of 4 bytes of every rank, 16 bytes a call, and dH: of 4 bytes a number, or 2
    merge = share * ranks * (12 + 16 / CASE.tokens)
    assert bytes_a_token("group=", ranks) == pytest.approx(merge + 2 * share * 4 * d)
    assert bytes_a_token("group=, vocab_size", ranks) == pytest.approx(merge + 2 * share * 4 * d)
    assert bytes_a_token("group=, dH in its dtype", ranks) == pytest.approx(merge + 2 * share * 2 * d)
    # h gathered in two bytes, dH scattered in four: each is sent once and not twice
    assert bytes_a_token("sequence parallel", ranks) == pytest.approx(share * (2 * d + 12 * ranks + 4 * d))
    assert bytes_a_token("loss_parallel", ranks) == pytest.approx(2 * share * (3 * 4 + 2 * d))
    assert bytes_a_token("loss_parallel, sequence parallel", ranks) == pytest.approx(share * (2 * 3 * 4 + 4 * d))
    assert bytes_a_token("logits gathered", ranks) == pytest.approx(share * (2 * CASE.vocab + 2 * 2 * d))
    weight = 2 * CASE.vocab * d / CASE.tokens
    assert bytes_a_token("data parallel", ranks) == pytest.approx(2 * share * weight)
    assert bytes_a_token("fully sharded", ranks) == pytest.approx(3 * share * weight)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_one_rank_sends_nothing(name: str) -> None:
    result = cost_model.predict(CASE, name, 1, FAST, NODE)
    assert (result.bytes_a_token, result.wire) == (0, 0)
    assert result.efficiency == pytest.approx(3 / ARRANGEMENTS[name].products)


def test_a_collective_takes_its_steps_and_its_bytes() -> None:
    link = Link(latency=1.0, bandwidth=10.0)
    ring = Collective("all_reduce", 40.0)
    assert cost_model.seconds(ring, 2, link) == pytest.approx(2 * 1 + 2 * 40 / 2 / 10)
    assert cost_model.seconds(ring, 4, link) == pytest.approx(min(6 + 1.5 * 4, 4 + 2 * 4))
    assert cost_model.seconds(Collective("all_reduce", 0.0), 1024, link) == 20  # up and down a tree
    for kind in ("all_gather", "reduce_scatter"):
        assert cost_model.seconds(Collective(kind, 40.0), 4, link) == pytest.approx(3 + 0.75 * 4)
    assert cost_model.seconds(ring, 1, link) == 0


@given(
    kind=st.sampled_from(KINDS),
    nbytes=st.floats(0, 1e12),
    ranks=st.integers(2, 1024),
    latency=st.floats(0, 1e-3),
    bandwidth=st.floats(1e6, 1e12),
)
def test_a_collective_takes_no_less_than_what_it_must_send(
    kind: str, nbytes: float, ranks: int, latency: float, bandwidth: float
) -> None:
    collective, link = Collective(kind, nbytes), Link(latency, bandwidth)
    spent = cost_model.seconds(collective, ranks, link)
    assert spent >= cost_model.sent(collective, ranks) / bandwidth * (1 - 1e-12)
    assert spent <= cost_model.seconds(collective, ranks, Link(2 * latency, bandwidth / 2)) * (1 + 1e-12)
    assert spent <= cost_model.seconds(Collective(kind, 2 * nbytes), ranks, link) * (1 + 1e-12)


def test_the_work_is_shared_and_memory_is_a_floor() -> None:
    plain = ARRANGEMENTS["group="]
    for ranks in (1, 2, 8):
        alone = cost_model.compute(CASE, plain, ranks, Chip(1e15, float("inf")))
        assert alone == pytest.approx(4 * 2 * 8192 * 4096 * 128000 / ranks / 1e15)
    shared = cost_model.compute(CASE, plain, 1024, Chip(float("inf"), 4e12))
    assert shared == pytest.approx(2 * (8192 + 125) * 4096 * 2 / 4e12)  # h and dH whole, W and dW of 125 classes
    tokens = cost_model.compute(CASE, ARRANGEMENTS["data parallel"], 1024, Chip(float("inf"), 4e12))
    assert tokens == pytest.approx(2 * (8 + 128000) * 4096 * 2 / 4e12)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_without_a_wire_efficiency_is_that_of_the_products(name: str) -> None:
    free = Network(FREE, FREE, 8)
    for ranks in RANKS[:6]:
        result = cost_model.predict(CASE, name, ranks, Chip(1e15, float("inf")), free)
        assert result.wire == 0
        assert result.efficiency == pytest.approx(3 / ARRANGEMENTS[name].products)
        assert result.step == result.compute


def test_a_merge_by_one_gather_sends_more_and_waits_less_where_ranks_are_few() -> None:
    two, one = (lambda w, name=name: MERGES[name](CASE, w) for name in ("two all-reduces", "one all-gather"))
    for ranks in (2, 8, 64):
        assert sum(cost_model.sent(each, ranks) for each in one(ranks)) == 12 * CASE.tokens * (ranks - 1)
        assert sum(cost_model.sent(each, ranks) for each in two(ranks)) == pytest.approx(
            24 * CASE.tokens * (ranks - 1) / ranks
        )
    slow = Link(latency=1.0, bandwidth=float("inf"))
    assert cost_model.wire(one(2), 2, slow) == 1
    assert cost_model.wire(two(2), 2, slow) == 4
    assert cost_model.wire(one(64), 64, slow) > cost_model.wire(two(64), 64, slow)


def test_ranks_beyond_a_node_are_linked_by_the_slower_link() -> None:
    assert NODE.link(8) == NODE.inside
    assert NODE.link(9) == NODE.between
    inside, beyond = (cost_model.predict(CASE, "group=", ranks, FAST, NODE).wire for ranks in (8, 16))
    assert beyond > 5 * inside


def test_tensor_parallelism_of_the_head_sends_less_than_sharded_weights_up_to_about_as_many_tokens_as_classes() -> None:
    """2 D (N classes' worth: gather, gather, scatter) against 6 N D and the statistics."""
    tokens = cost_model.break_even("sequence parallel", "fully sharded", CASE, 8, NODE)
    assert tokens == pytest.approx(6 * CASE.hidden * CASE.vocab / (6 * CASE.hidden + 12 * 8))
    assert tokens == pytest.approx(CASE.vocab, rel=0.005)
    replicated = cost_model.break_even("group=", "data parallel", CASE, 8, NODE)
    assert replicated == pytest.approx(CASE.vocab / 2, rel=0.005)


def test_the_table_has_a_line_for_every_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    text = cost_model.main(["--shapes", CASE.text, "--latency", "5", "--bandwidth", "300"])
    lines = [line for line in text.splitlines() if line.startswith("| 1024 |")]
    assert len(lines) == len(ARRANGEMENTS) + 1  # and how the statistics are merged
    assert f"| {bytes_a_token('group=', 1024):,.0f} |" in lines[0]
    assert capsys.readouterr().out.strip() == text


def test_an_arrangement_or_a_rate_that_is_not_known_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cost_model.main(["--arrangements", "pipeline"])
    assert "no arrangement is called 'pipeline'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no rate of bfloat16 products is known of the chip 'cpu': give --tera"):
        cost_model.main(["--chip", "cpu"])

"""Small heads are left to Inductor, which compiles exactly what it would have compiled, and the report says so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedhead
from fusedhead.backend import run_pass
from fusedhead.legality.profitability import LEAST_ELSEWHERE, LEAST_LOGITS, pays_from
from fusedhead.lowering.plan.plan import plan
from fusedhead.lowering.plan.problem import Problem
from fusedhead.options import Options, split_options
from tests.eager_stack import Rewritten

D, V = 4, 64


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def operands(tokens: int, vocab: int = V) -> tuple[Tensor, Tensor, Tensor]:
    h, w = torch.randn(tokens, D, requires_grad=True), torch.randn(vocab, D, requires_grad=True)
    return h, w, torch.randint(0, vocab, (tokens,))


def record(fn, *args, least: object = "auto", **options):
    torch.compiler.reset()  # a second size would make the tokens a symbol
    rewritten = Rewritten(fn, {"fusedhead.min_logits": least}, **options)
    rewritten(*args)
    (head,) = rewritten.report.heads
    return head


def test_a_small_head_is_left_and_the_sentence_names_the_remedy() -> None:
    head = record(loss, *operands(8))
    assert not head.fused
    assert "512 logits are too few" in head.reason
    assert "fusedhead.min_logits, 1,048,576; with 0 it would be fused" in head.reason
    assert (head.logits, head.bytes_saved) == ("built", 0)


def test_the_number_is_the_first_that_is_fused() -> None:
    assert record(loss, *operands(8), least=8 * V).fused
    assert not record(loss, *operands(8), least=8 * V + 1).fused
    assert record(loss, *operands(8), least=0).fused


def test_a_large_head_is_fused_without_being_asked() -> None:
    assert record(loss, *operands(LEAST_ELSEWHERE // 4096, 4096)).fused
    assert not record(loss, *operands(LEAST_ELSEWHERE // 4096 - 1, 4096)).fused
    assert LEAST_LOGITS["cuda"] > LEAST_ELSEWHERE


def test_each_of_several_stacked_heads_counts_alone() -> None:
    weights = torch.nn.Parameter(torch.randn(4, V, D))

    def per_batch(q: Tensor, y: Tensor) -> Tensor:
        return F.nll_loss(F.log_softmax(q @ weights.transpose(1, 2), -1).flatten(0, 1), y)

    inputs = torch.randn(4, 8, D, requires_grad=True), torch.randint(0, V, (32,))
    assert record(per_batch, *inputs, least=8 * V).fused
    assert "512 logits are too few" in record(per_batch, *inputs, least=8 * V + 1).reason


def test_what_is_wrong_with_a_head_comes_before_its_size() -> None:
    def written(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        w.detach().mul_(0.5)
        return F.cross_entropy(z, y)

    assert "in place before the loss" in record(written, *operands(8)).reason


def test_pieces_of_one_head_count_together() -> None:
    def pieces(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return sum(F.cross_entropy(F.linear(a, w), b) for a, b in zip(h.split(2), y.split(2)))

    rewritten = Rewritten(pieces, {"fusedhead.min_logits": 8 * V})
    rewritten(*operands(8))
    assert [head.fused for head in rewritten.report.heads] == [True] * 4


def test_symbolic_token_counts_are_not_guarded() -> None:
    graphs = []

    def backend(gm, inputs):
        graphs.append(run_pass(gm, Options(min_logits=8 * V))[1])
        return gm.forward

    compiled = torch.compile(loss, backend=backend)
    for tokens in (8, 9, 70, 5):
        h, w, y = operands(tokens)
        torch._dynamo.mark_dynamic(h, 0)
        torch._dynamo.mark_dynamic(y, 0)
        compiled(h, w, y)
    assert [head.fused for graph in graphs for head in graph.heads] == [True]


def test_small_logits_returned_alone_are_plain_tensors() -> None:
    def logits(h: Tensor, w: Tensor) -> Tensor:
        return F.linear(h, w)

    h, w = torch.randn(128, 4, requires_grad=True), torch.randn(2048, 4, requires_grad=True)
    small = torch.compile(logits, backend="fusedhead", options={"fusedhead.min_logits": "auto"})(h, w)
    assert type(small) is Tensor
    torch.compiler.reset()
    deferred = torch.compile(logits, backend="fusedhead", options={"fusedhead.min_logits": 0})(h, w)
    assert type(deferred) is not Tensor
    report = fusedhead.explain(logits, options={"fusedhead.min_logits": "auto"})(h, w)
    assert "too few" in report.heads[0].reason


def test_a_small_head_is_compiled_as_inductor_compiles_it() -> None:
    inputs = operands(8)
    results = []
    for backend, options in (("inductor", {}), ("fusedhead", {"fusedhead.min_logits": "auto"})):
        torch.compiler.reset()
        value = torch.compile(loss, backend=backend, options=options)(*inputs)
        results.append([value, *torch.autograd.grad(value, inputs[:2])])
    for mine, its in zip(*results):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("bad", [-1, "many", True, 1.5])
def test_anything_but_a_number_is_an_error(bad: object) -> None:
    with pytest.raises(ValueError, match="0 for every head"):
        split_options({"fusedhead.min_logits": bad})


def test_the_environment_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDHEAD_MIN_LOGITS", "4096")
    assert split_options({})[0].min_logits == 4096
    monkeypatch.delenv("FUSEDHEAD_MIN_LOGITS")
    assert split_options({})[0].min_logits == "auto"


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(263, 768, 4000), (300, 512, 4096)])
def test_a_head_whose_windows_hold_more_than_its_logits_is_left(tokens: int, hidden: int, vocab: int) -> None:
    inputs = torch.randn(tokens, hidden, requires_grad=True), torch.randn(vocab, hidden, requires_grad=True)
    inputs = *inputs, torch.randint(0, vocab, (tokens,))
    head = record(loss, *inputs)
    assert not head.fused
    assert "its windows would hold" in head.reason
    forced = record(loss, *inputs, least=0)
    assert forced.fused
    assert forced.bytes_saved < 0
    assert f"-{-forced.bytes_saved / 2**20:,.1f} MiB" in str(forced)


def test_the_gate_and_the_report_see_one_number() -> None:
    for tokens in (256, 300, 400, 600, 1000, 2000):
        h, w = (torch.randn(n, 256, requires_grad=True) for n in (tokens, 4096))
        head = record(loss, h, w, operands(tokens, 4096)[2])
        assert head.bytes_saved >= 0
        assert head.fused or "its windows would hold" in head.reason


def test_where_tokens_are_a_symbol_each_call_is_held_to_that_number() -> None:
    h, w = torch.randn(300, 512, requires_grad=True), torch.randn(4096, 512, requires_grad=True)
    least = pays_from(h, w, "auto", 0)
    assert least > LEAST_ELSEWHERE
    for tokens, grows in ((least // 4096 - 16, True), (least // 4096, False), (4 * least // 4096, False)):
        held = plan(Problem(tokens, 4096, 512, torch.float32, "cpu", torch.float32)).predicted_bytes
        assert (held > tokens * 4096 * 4) == grows
    assert pays_from(h, w, 5000, 0) == 5000

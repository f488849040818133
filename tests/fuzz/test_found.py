"""Programs that random search found to come out wrong once, minimised. Each says what was missed."""

from __future__ import annotations

from tests.fuzz.compare import compare
from tests.fuzz.program import Block, Case

SIZES = {"B": 2, "T": 3, "D": 4, "V": 11}
H, FLAT = "torch.randn(B, T, D).to(dtype).requires_grad_()", "torch.randn(B * T, D).to(dtype).requires_grad_()"
W = "(torch.randn(V, D) * 0.6).to(dtype).requires_grad_()"


def agrees(case: Case) -> None:
    verdict = compare(case)
    assert not verdict.kind, f"{verdict.kind}: {verdict.detail}\n{verdict.report}"


def test_a_loss_that_nobody_uses() -> None:
    body = ("z = F.linear(h, w)", "lp = z - torch.logsumexp(z, 2, keepdim=True)", "x = h * 2")
    agrees(Case(SIZES, {"h": H, "w": W}, body, ("x",)))


def test_log_probabilities_made_of_the_logits_and_their_own_logsumexp() -> None:
    body = (
        "z = F.linear(h, w)",
        "lp = z - torch.logsumexp(z, 2, keepdim=True)",
        "l = -lp.gather(2, y.unsqueeze(2)).squeeze(2)",
    )
    agrees(Case(SIZES, {"h": H, "w": W, "y": "torch.randint(0, V, (B, T))"}, body, ("l",)))


def test_a_statistic_under_no_grad_that_others_differentiate() -> None:
    quiet = Block("with torch.no_grad():", ("e = z.logsumexp(1)",))
    inputs = {"h": FLAT, "w": W, "y": "torch.randint(0, V, (B * T,))"}
    agrees(Case(SIZES, inputs, ("z = h @ w.t()", "l = F.cross_entropy(z, y)", quiet), ("l", "e")))
    agrees(Case(SIZES, inputs, ("z = h @ w.t()", quiet, "l = F.cross_entropy(z, y)"), ("l", "e")))


def test_returned_logits_that_were_written_through_another_name() -> None:
    body = ("z = F.linear(h, w)", "z.mul_(0.8)", "lse = z.logsumexp(2)", "r = z.unsqueeze(0)")
    for logits in ("eager", "deferred"):
        agrees(Case(SIZES, {"h": H, "w": W}, body, ("lse", "r"), logits=logits))


def test_hidden_states_written_after_the_loss_of_a_frozen_weight() -> None:
    body = ("z = F.linear(h, w)", "l = F.cross_entropy(z, y, reduction='none')", "h.detach().add_(0.1)")
    inputs = {"h": FLAT, "y": "torch.randint(0, V, (B * T,))", "w": "torch.randn(V, D).to(dtype)"}
    agrees(Case(SIZES, inputs, body, ("l",)))


def test_operands_of_different_dtypes() -> None:
    body = ("z = F.linear(h.to(torch.bfloat16), w)", "l = F.cross_entropy(z.float(), y)")
    agrees(Case(SIZES, {"h": FLAT, "w": W, "y": "torch.randint(0, V, (B * T,))"}, body, ("l",)))


def test_losses_written_into_before_a_linear_reduction() -> None:
    inputs = {"h": FLAT, "w": W, "y": "torch.randint(0, V, (B * T,))", "m": "torch.rand(B * T).to(dtype)"}
    for written in ("l[m < 0.5] = 0.0", "l[:1] = 0.0", "l.detach().mul_(0.5)", "m.mul_(0.5)"):
        body = ("z = F.linear(h, w)", "l = F.cross_entropy(z, y, reduction='none') * 2", written, "s = (l * m).sum()")
        agrees(Case(SIZES, inputs, body, ("s",)))


def test_detached_logits_that_are_returned() -> None:
    body = ("z = F.linear(h, w)", "l = F.cross_entropy(z, y)", "r = z.detach()")
    inputs = {"h": FLAT, "w": W, "y": "torch.randint(0, V, (B * T,))"}
    for logits in ("eager", "deferred"):
        agrees(Case(SIZES, inputs, body, ("l", "r"), logits=logits))


def test_a_weight_written_after_the_cast_that_the_head_reads() -> None:
    body = (
        "z = F.linear(h.to(torch.bfloat16), w.to(torch.bfloat16))",
        "w.detach().mul_(1.5)",
        "lse = z.logsumexp(1)",
    )
    for logits in ("eager", "deferred"):
        agrees(Case(SIZES, {"h": FLAT, "w": "torch.randn(V, D)"}, body, ("lse", "z"), logits=logits))


def test_vectors_that_join_the_logits_after_they_were_detached() -> None:
    inputs = {"h": FLAT, "w": W, "y": "torch.randint(0, V, (B * T,))", "s": "torch.full((), 0.3).requires_grad_()"}
    inputs |= {"c": "torch.randn(V).requires_grad_()", "m": "torch.rand(B * T, 1).requires_grad_()"}
    for detached in ("z.detach()", "z.data", "(z + c).detach() * s"):
        for step in ("z * s.exp()", "z - s", "z + c", "z * m"):
            body = ("z = F.linear(h, w)", f"z = {detached}", f"z = {step}", "l = F.cross_entropy(z, y)")
            for logits in ("eager", "deferred"):
                agrees(Case(SIZES, inputs, body, ("l",), logits=logits))
    quiet = Block("with torch.no_grad():", ("z = z + c",))
    body = ("z = F.linear(h, w)", quiet, "z = z * c", "l = F.cross_entropy(z, y, reduction='none')")
    agrees(Case(SIZES, inputs, body, ("l",)))


def test_take_along_dim_takes_any_index_modulo_the_size() -> None:
    body = ("z = F.linear(h, w)", "l = -F.log_softmax(z, 2).take_along_dim(y.unsqueeze(2), 2).squeeze(2)")
    agrees(Case(SIZES, {"h": H, "w": W, "y": "torch.randint(-100, 100, (B, T))"}, body, ("l",)))


def test_a_result_of_a_row_program_that_is_written_to() -> None:
    inputs = {"h": H, "w": W, "y": "torch.randint(0, V, (B, T))"}
    for made in ("lp.max(2).values", "lp.amax(2)", "lp.topk(2, 2).values.sum(2)"):
        body = ("lp = F.log_softmax(F.linear(h, w), 2)", f"l = {made}", "k = l * 2", "l.mul_(0.5)", "m = l + 1")
        agrees(Case(SIZES, inputs, body, ("l", "k", "m")))
        agrees(Case(SIZES, inputs, body[:-1], ("l",), no_grad=True))


def test_row_programs_with_a_detach_on_the_way() -> None:
    inputs = {"h": FLAT, "w": W, "y": "torch.randint(0, V, (B * T,))", "lb": "torch.randn(2, D).requires_grad_()"}
    body = ("z = F.linear(h, w).clamp(-5, 5).detach()", "l = F.cross_entropy(z, y)")
    agrees(Case(SIZES, inputs, body, ("l",)))
    agrees(Case(SIZES, inputs, ("w1 = w.detach() + torch.ones(V, 2) @ lb", "k = w1.detach().logsumexp(1)"), ("k",)))


def test_values_of_a_row_program_that_nobody_uses() -> None:
    body = ("z = F.linear(h, w)", "l = z.logsumexp(1)", "q = torch.log(torch.softmax(z, 1) + 1e-9)")
    agrees(Case(SIZES, {"h": FLAT, "w": W}, body, ("l",)))
    agrees(Case(SIZES, {"h": FLAT, "w": W}, body, ("z",)))


def test_results_of_row_programs_with_different_numbers_of_tokens() -> None:
    body = ("z = F.linear(h, w)", "l = F.cross_entropy(z.reshape(-1, V), y.reshape(-1))".replace("V", "11"))
    body += ("some = z[:, 0]", "t = -(torch.full_like(some, 0.1) * some).sum(1)", "hit = z.topk(2, 2).indices")
    agrees(Case(SIZES, {"h": H, "w": W, "y": "torch.randint(0, V, (B, T))"}, body, ("l", "t", "hit")))


PARAMETER = {"h": FLAT, "w": "torch.nn.Parameter(torch.randn(V, D) * 0.6)", "y": "torch.randint(0, V, (B * T,))"}


def test_a_view_whose_base_is_written_where_another_grad_mode_holds() -> None:
    loss = "l = F.cross_entropy(F.linear(h, w), y)"
    for inside in (("v = c.view(-1)", "c += 1", "v += 1"), ("v = c.squeeze(0)", "v += 1")):
        body = ("c = h * 2", Block("with torch.no_grad():", inside), "c.mul_(2)", loss)
        agrees(Case(SIZES, PARAMETER, body, ("l", "c")))


def test_a_result_a_token_cut_into_pieces_whose_number_is_a_symbol() -> None:
    for pieces in (1, 2):
        body = ("z = F.linear(h, w)", "l = F.cross_entropy(z, y)", f"c = z.prod(-1).chunk({pieces}, 0)[0]")
        agrees(Case(SIZES, PARAMETER, body, ("l", "c"), dynamic=True))


def test_losses_that_are_cut_into_pieces_beside_their_sum() -> None:
    for cut in ("l.chunk(2)[0]", "l.split(2)[1]", "l.unbind()[3]"):
        body = ("l = F.cross_entropy(F.linear(h, w), y, reduction='none')", "t = l.sum()", f"c = {cut} * 3")
        agrees(Case(SIZES, PARAMETER, body, ("t", "c")))


def test_a_total_of_a_row_program_that_its_logits_are_combined_with() -> None:
    total = "t = F.kl_div(z.log_softmax(-1), -z, reduction='sum')"
    for step in ("z + t", "(z * z * t).prod(-1, keepdim=True) + z"):
        body = ("z = F.linear(h, w)", total, f"l = ({step}).log_softmax(-1).gather(1, y[:, None])")
        agrees(Case(SIZES, PARAMETER, body, ("l",)))


def test_a_reader_of_the_logits_that_leads_to_nothing_gives_its_operands_no_gradient() -> None:
    body = (
        "z = F.linear(h, w)",
        "l = F.kl_div(F.log_softmax(z, 1), torch.softmax(t, 1))",
        "idle = (s * z).logsumexp(1)",
    )
    inputs = {"h": FLAT, "w": W, "t": "torch.randn(B * T, V)", "s": "torch.tensor(0.3).to(dtype).requires_grad_()"}
    agrees(Case(SIZES, inputs, body, ("l",)))


def test_what_arrives_at_a_label_whose_class_is_masked_is_stopped_there_nan_too() -> None:
    body = (
        "z = F.linear(h, w)",
        "z[..., [1, 2]] = -float('inf')",
        "lse = z.logsumexp(dim=2)",
        "zy = z.gather(2, y.unsqueeze(2)).squeeze(2)",
        "l = (zy - zy.detach()).exp().mean()",
    )
    agrees(Case(SIZES, {"h": H, "w": W, "y": "torch.randint(0, 3, (B, T))"}, body, ("l",)))

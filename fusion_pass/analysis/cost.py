"""The cost of the op calls of heads: bytes of workspace and FLOP, by the number of tokens.

The numbers come from the planner. `legality.profitability` decides by them, and the report shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusedhead.analysis.reasons import NotInForward
from fusedhead.analysis.site import Site, tokens_of
from fusedhead.graph.nodes import fake, hint, name_of
from fusedhead.graph.reasons import Refusal
from fusedhead.ir.expr import nodes_of
from fusedhead.kernels.contract import Needs
from fusedhead.kernels.tokenwise.engine import head_inputs
from fusedhead.kernels.tokenwise.program import read
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.kernels.transform.transform import parse
from fusedhead.lowering.checks import parse_stats
from fusedhead.lowering.engines import engine_for
from fusedhead.lowering.plan import float8 as float8_plan
from fusedhead.lowering.plan.plan import Plan, plan
from fusedhead.lowering.plan.problem import Problem, writes_logits
from fusedhead.lowering.token_ops import windows_of


class Price(NamedTuple):
    """The engine that computes some heads together, and its cost by the number of their tokens."""

    engine: str  # for people
    forward_only: bool
    plan: Callable[[int], tuple[int, int]]  # tokens of all heads together -> bytes of workspace, FLOP
    tokens: int  # of all of them, when the graph was compiled


def problems(call: Node, float8: bool) -> Callable[[bool, int], Problem]:
    """The planner's problems of a head's call, as a function of (is the tail linear, number of tokens).

    ``float8``: whether products of its gradients may be float8, and a kernel takes the call.
    """
    h, w, y, cols, rows = (fake(call.args[i]) for i in (0, 1, 2, 3, 4))  # type: ignore[arg-type]
    needs = Needs(*(x.requires_grad for x in (h, w, cols, rows)))
    transform = parse(str(call.args[6]))
    want = parse_stats(str(call.args[7]))
    products, explicit = product_dtype(h.dtype, w.device.type), writes_logits(want, transform)
    vocab, hidden = (int(size) for size in w.shape)
    labels, sums = int(y.shape[1]), bool(want & {"sum", "spread"})

    def problem(linear: bool, tokens: int) -> Problem:
        return Problem(
            tokens, vocab, hidden, h.dtype, w.device.type, products, needs, linear, True, explicit, transform, labels,
            sums, float8,
        )  # fmt: skip

    return problem


def why_no_float8(call: Node) -> str:
    """Why no kernel for float8 products takes a head's call, or "". `plan.float8` knows the other reasons."""
    if name_of(call) != "head_stats":
        return "its classes lie in shards"
    h, w = fake(call.args[0]), fake(call.args[1])  # type: ignore[arg-type]
    if not engine_for(h.dtype, w.device.type).float8_serves(None):
        return "no GPU with kernels for float8 products, or their self-check has not passed yet"
    if not all(statically_known_true(x.stride(1) == 1) for x in (h, w)):
        return "w or h is not contiguous along the hidden size"
    return ""


def price_of_statistics(call: Node, memory: int, float8: bool = False) -> Callable[[Refusal | None], Price]:
    """The price of a head's call. ``why``: the reason that its gradients are not computed in the forward sweep.

    ``float8``: whether float8 products of gradients are asked for.
    """
    why_exact = why_no_float8(call) if float8 else ""  # read now: an upgrade replaces the call
    problem, tokens = problems(call, float8 and not why_exact), hint(fake(call.args[0]).shape[0]) or 0  # type: ignore[arg-type]

    def price(why: Refusal | None) -> Price:
        def bytes_and_flop(n: int) -> tuple[int, int]:
            plan_of_call = plan(problem(not why, n), memory=memory)
            return plan_of_call.predicted_bytes, plan_of_call.predicted_flop

        head = problem(not why, tokens)
        planned = plan(head, memory=memory)
        text = engine_text(planned, why)
        if head.dtype == torch.float16 and why is None:
            text += "; dH and dW times a power of two until the gradient of the loss is known"
        if float8 and not is_forward_only(why):
            text += f"; {products_text(planned, head, memory, why_exact)}"
        return Price(text, is_forward_only(why), bytes_and_flop, tokens)

    return price


def engine_text(planned: Plan, why: Refusal | None) -> str:
    """The engine of a head and how it computes, as text for the report."""
    how = "gradients in the forward sweep" if why is None else f"recompute in the backward ({why})"
    return f"{planned.engine.name}: {'forward only' if is_forward_only(why) else how}"


def products_text(planned: Plan, head: Problem, memory: int, why: str) -> str:
    """What the products of a head's gradients are where float8 was asked for, as text for the report.

    ``why``: the reason that no kernel for float8 products takes the head, or "".
    """
    if planned.algorithm == "float8":
        return f"dH and dW by float8 products ({float8_plan.ERROR})"
    why = why or float8_plan.why_exact(head, memory) or "its windows hold too much"
    return f"dH and dW exact ({why})"


def is_forward_only(why: Refusal | None) -> bool:
    """Whether no gradient is computed at all, given why none is computed in the forward sweep."""
    return why is not None and why.reason is NotInForward.NO_GRADIENT


def price_of_token_program(call: Node, memory: int, float8: bool = False) -> Callable[[Refusal | None], Price]:
    """The price of a token program's call. ``why``: the reason that its gradients are not computed in the forward
    sweep. ``float8``: whether float8 products of gradients are asked for.
    """
    arguments: Any = call.args[0]
    tensors: list[Any] = [fake(t) for t in arguments]
    program, heads = str(call.args[1]), head_inputs(read(str(call.args[1])))
    tokens = hint(tensors[heads[0][0]].shape[0]) or 0
    product = 2 * sum(int(tensors[w].shape[0]) * int(tensors[w].shape[1]) for _, w in heads)  # FLOP of a token

    def price(why: Refusal | None) -> Price:
        products = 1 if is_forward_only(why) else 4 if why else 3

        def bytes_and_flop(n: int) -> tuple[int, int]:
            needs = None if is_forward_only(why) else [t.requires_grad for t in tensors]
            return windows_of(tensors, program, memory, n, needs).predicted_bytes, products * product * n

        how = ", with their gradients" if why is None else f", again in the backward ({why})"
        text = "row windows: the program's own ops on some tokens at a time"
        if not is_forward_only(why):
            text += how + ("; dH and dW exact (the program's own ops take its logits)" if float8 else "")
        return Price(text, is_forward_only(why), bytes_and_flop, tokens)

    return price


def price_outside(site: Site, memory: int) -> Price:
    """The price of a loss that the caller may take of returned logits."""
    head = site.head
    vocab, hidden = (int(size) for size in head.weight.val.shape)
    h, w = (any(fake(node).requires_grad for node in nodes_of([x])) for x in (head.hidden, head.weight))
    needs = Needs(h, w, False, False)

    def bytes_and_flop(n: int) -> tuple[int, int]:
        device = head.weight.val.device.type
        products = product_dtype(head.dtype, device)
        plan_of_call = plan(Problem(n, vocab, hidden, head.dtype, device, products, needs), memory=memory)
        return plan_of_call.predicted_bytes, plan_of_call.predicted_flop

    return Price("as the caller asks", not any(needs), bytes_and_flop, hint(tokens_of(site)) or 0)


def sizes_of(prices: Sequence[Price], tokens: int, token_bytes: int) -> Callable[[int], tuple[int, int]]:
    """N -> bytes of a head's logits, and of the workspace that replaces them.

    Heads that are computed together share their workspace by tokens; calls that run one after another add up.
    """

    def sizes(n: int) -> tuple[int, int]:
        held = 0.0
        for price in prices:
            total = max(1, round(n * price.tokens / tokens) if tokens else n)
            held = max(held, price.plan(total)[0] * min(1.0, n / total))
        return n * token_bytes, int(held)

    return sizes


def mebibytes(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / 2**20:,.1f} MiB"

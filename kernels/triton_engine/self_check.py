"""The child process of a self-check: it runs small heads with the kernels in question and with trusted code.

Both are compared with float64 on the same operands. Pairs of warpgroups are held against the plain sweeps, the Triton
engine against eager code. The kernels pass if their error is at most ``slack`` times the trusted one (plus ``floor``)
and repeated calls give equal statistics. The heads cover every path of a sweep: several tiles a program, partial tiles,
partial steps over D, several labels, and rows whose exponentials overflow and are swept again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels import self_check
from fusedhead.kernels.contract import OPERAND_NEEDS, Head, RowGrads, Windows
from fusedhead.kernels.reference import row_stats
from fusedhead.kernels.transform.transform import apply, parse

CAP = "mul:0.05 tanh mul:20.0"
PLAIN_HEADS = (  # N, V, D, K, transform, dtype
    (1400, 12007, 200, 1, "", torch.bfloat16),
    (1400, 6016, 1024, 3, "", torch.float16),
)
FLOAT8_HEAD = (1400, 12007, 256, 1, "", torch.bfloat16)
CAPPED = (300, 9001, 512, 1, CAP, torch.bfloat16)
REPEATS = 5
LOUD = 80.0  # a row of h times LOUD has exponentials that overflow
WHOLE_ROWS = 256  # rows of float64 logits that exist at once


class Trial(NamedTuple):
    """The heads that kernels are tried on, and the error allowed: slack · (the trusted code's error) + floor."""

    heads: tuple[tuple[int, int, int, int, str, torch.dtype], ...]
    slack: float
    floor: float  # relative difference of float32 sums in another order, or by tensor cores


CLAIMS = {
    "pairs": Trial(PLAIN_HEADS, 1.1, 1e-6),
    "float8": Trial((FLOAT8_HEAD,), 1.5, 2e-3),  # e4m3 rounds to 3 bits; the trusted products are bfloat16
    "triton": Trial((*PLAIN_HEADS, CAPPED), 1.5, 1e-5),  # eager code rounds elsewhere
}


class Found(NamedTuple):
    """Results of one run: lse [N], picked [N, K], dh [N, D], dw [V, D]."""

    lse: Tensor
    picked: Tensor
    dh: Tensor
    dw: Tensor


def random_head(
    n: int, v: int, d: int, k: int, transform: str, dtype: torch.dtype, device: torch.device
) -> tuple[Head, RowGrads]:
    """A head with random operands, every 131st row of h times `LOUD`, and upstream gradients of lse and picked."""
    draw = torch.Generator(device).manual_seed(n + v)
    h = torch.randn(n, d, device=device, generator=draw)
    h[::131] *= LOUD
    w = torch.randn(v, d, device=device, generator=draw) / d**0.5
    y = torch.randint(0, v, (n, k), device=device, generator=draw)
    nothing = torch.empty(0, device=device)
    head = Head(h.to(dtype), w.to(dtype), y, nothing, nothing, nothing, parse(transform))
    lse, picked = (torch.rand(n, *shape, device=device, generator=draw) / n for shape in ((), (k,)))
    return head, RowGrads(lse, -picked)


Check = Callable[[Head, RowGrads], Iterator[Found]]


def truth(head: Head, upstream: RowGrads) -> Found:
    """The results in float64, by definition and autograd, `WHOLE_ROWS` rows of logits at a time."""
    w = head.w.double().requires_grad_()
    dw, rows = torch.zeros_like(w), []
    for at in torch.arange(len(head.h), device=head.h.device).split(WHOLE_ROWS):
        h = head.h[at].double().requires_grad_()
        stats = row_stats(head._replace(h=h, w=w, y=head.y[at], u=head.u.double()))
        loss = (stats.lse * upstream.lse[at]).sum() + (stats.picked * upstream.picked[at]).sum()  # type: ignore
        dh, part = torch.autograd.grad(loss, (h, w))
        dw += part
        rows.append((stats.lse.detach(), stats.picked.detach(), dh))  # type: ignore[union-attr]
    lse, picked, dh = map(torch.cat, zip(*rows))
    return Found(lse, picked, dh, dw)


def one_pass_and_sweeps(engine: ModuleType, head: Head, upstream: RowGrads) -> Iterator[Found]:
    """The results of the single pass, then those of one sweep for the statistics and one for the gradients."""
    windows = Windows(len(head.h), len(head.w), head.h.dtype)
    got, grads = engine.head_loss(head, upstream, OPERAND_NEEDS, windows)
    yield Found(got.lse, got.picked, grads.h, grads.w)
    got = engine.head_stats(head, frozenset({"lse", "picked"}), windows)
    grads = engine.head_stats_backward(head, upstream, got, OPERAND_NEEDS, windows)
    yield Found(got.lse, got.picked, grads.h, grads.w)


def by_float8(head: Head, upstream: RowGrads) -> Iterator[Found]:
    """The results of the float8 pass with all tokens in one window, twice, to pair with `one_pass_and_sweeps`."""
    from fusedhead.kernels.triton_engine.float8.single_pass import one_float8_pass

    n = len(head.h)
    results: tuple[Any, Any] = one_float8_pass(head, upstream, Windows(n, len(head.w), head.h.dtype, n))
    got, grads = results
    outcome = Found(got.lse, got.picked, grads.h, grads.w)
    yield from (outcome, outcome)


def by_eager(head: Head, upstream: RowGrads) -> Iterator[Found]:
    """The results of eager code in the operands' dtype, twice, to pair with `one_pass_and_sweeps`."""
    h, w = head.h.detach().requires_grad_(), head.w.detach().requires_grad_()
    z = apply(head.transform, (h @ w.T).float(), head.cols, head.rows)
    lse, picked = z.logsumexp(1), z.gather(1, head.y)
    loss = (lse * upstream.lse).sum() + (picked * upstream.picked).sum()  # type: ignore[operator]
    outcome = Found(lse.detach(), picked.detach(), *torch.autograd.grad(loss, (h, w)))
    yield from (outcome, outcome)


def errors(measured: Found, exact: Found) -> list[float]:
    """‖x - truth‖ / ‖truth‖ of each result; inf where x is not finite."""
    norms = ((x.double() - t).norm() / t.norm() for x, t in zip(measured, exact))
    return [error if error < float("inf") else float("inf") for error in map(float, norms)]


def difference(claim: Trial, suspect: Check, trusted: Check, device: torch.device) -> str:
    """A sentence that says where the kernels in question err more than the trusted ones; "" where they do not."""
    for sizes in claim.heads:
        head, upstream = random_head(*sizes, device)
        exact = truth(head, upstream)
        allowed = [errors(results, exact) for results in trusted(head, upstream)]
        first = list(suspect(head, upstream))
        name = "N={}, V={}, D={}, K={}, transform {!r}, {}".format(*sizes)
        for results, most in zip(first, allowed):
            for what, error, trusted_error in zip(Found._fields, errors(results, exact), most):
                if not error <= claim.slack * trusted_error + claim.floor:
                    return f"{what} of a head ({name}) errs by {error:.1e}, the trusted one by {trusted_error:.1e}"
        for _ in range(REPEATS):
            for results, again in zip(first, suspect(head, upstream)):
                if not (torch.equal(results.lse, again.lse) and torch.equal(results.picked, again.picked)):
                    return f"the statistics of a head ({name}) differ from run to run"
    return ""


def asked_and_trusted(claim: str, device: torch.device) -> tuple[Check, Check]:
    """(a run of the kernels that ``claim`` names, a run of the trusted ones)."""
    from fusedhead.kernels.triton_engine import engine as triton_engine
    from fusedhead.kernels.triton_engine.launch import sweep

    def with_pairs(verdict: bool) -> Check:
        def run(head: Head, upstream: RowGrads) -> Iterator[Found]:
            self_check.decide("pairs", device, verdict)
            sweep.forget()
            if sweep.sweep("stream", head).tile.paired != verdict:
                raise AssertionError(f"pairs are {'not ' if verdict else ''}used for a plain head")
            return one_pass_and_sweeps(triton_engine, head, upstream)

        return run

    if claim == "pairs":
        return with_pairs(True), with_pairs(False)
    if claim == "float8":  # its sweep runs in pairs of warpgroups as well
        return by_float8, with_pairs(True)
    self_check.decide("pairs", device, False)
    return (lambda *head: one_pass_and_sweeps(triton_engine, *head)), by_eager


def device_named(index: int, uuid: str) -> torch.device:
    """The parent's device, found by its uuid if that is known: CUDA_VISIBLE_DEVICES may differ in this process."""
    for at in (index, *range(torch.cuda.device_count())):
        if not uuid or str(getattr(torch.cuda.get_device_properties(at), "uuid", "")) == uuid:
            return torch.device("cuda", at)
    raise RuntimeError(f"the GPU {uuid} is not visible here")


def main(argument: str) -> None:
    """Print "ready" once the trusted kernels have run, then the verdict as JSON, which the cache on disk gets too."""
    request = json.loads(argument)
    device = device_named(request["index"], request["uuid"])
    torch.cuda.set_device(device)
    for at in range(torch.cuda.device_count()):  # so that this process starts no self-check of its own
        self_check.decide("triton", torch.device("cuda", at), True)
    claim = CLAIMS[request["claim"]]
    suspect, trusted = asked_and_trusted(request["claim"], device)
    list(trusted(*random_head(*claim.heads[0], device)))
    torch.cuda.synchronize()
    print(self_check.FIRST_LINE, flush=True)
    try:
        reason = difference(claim, suspect, trusted, device)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    verdict = {"serves": not reason, "reason": reason}
    self_check.keep_verdict(request["key"], verdict)  # in this process: the parent may have stopped waiting
    print(json.dumps(verdict), flush=True)

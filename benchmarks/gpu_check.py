"""Does the CUDA engine keep its promises on this GPU?

    python benchmarks/gpu_check.py [--share i/n]          exit status 1 when a claim fails

Truth is float64. Every error is printed as a multiple of the error that eager PyTorch makes on the same inputs in
the same dtype (logits in the operands' dtype, then float32), and must not exceed 1.0. The claims that need no GPU
are in tests/kernels/test_sweeps_*.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_heads import BF16, F16, F32, OPERANDS, SOFTCAP, Case, make_grads, make_head
from torch import Tensor

from fusedhead.kernels.contract import DIFFERENTIABLE_STATS, STATS, Head, Needs, RowGrads, RowStats, Windows
from fusedhead.kernels.transform.transform import apply, parse
from fusedhead.kernels.triton_engine import engine

CASES = (
    *(Case(252, 768, 50257, t, grads=g) for t in (BF16, F16, F32) for g in ("loss", "stats")),
    *(Case(1024, 1024, 32000, t, tokens=384, grads=g) for t in (BF16, F16) for g in ("loss", "smooth")),
    Case(2048, 2048, 128256, BF16, tokens=1024),
    Case(1000, 512, 20000, BF16, tokens=384, kept=6016),
    Case(1000, 512, 20000, BF16, SOFTCAP, tokens=512, kept=2048),
    Case(512, 768, 30001, BF16, "addcol:0", kept=16000),
    Case(512, 768, 30001, BF16, "addcol:0"),
    Case(512, 768, 30001, F32, "addcol:0 mul:0.5", grads="stats", tokens=200),
    Case(1, 512, 32000, BF16),
    Case(7, 123, 507, BF16),
    Case(7, 123, 507, F32, grads="stats"),
    Case(65, 256, 4099, F16, transposed=True),
    Case(300, 512, 10000, BF16, transposed=True, grads="stats"),
    Case(300, 512, 10001, F32, transposed=True),
    Case(512, 768, 30001, BF16, SOFTCAP),
    Case(512, 768, 30001, BF16, SOFTCAP, grads="stats"),
    Case(512, 768, 30001, BF16, "addcol:0 mul:0.5", grads="stats", weighted=True),
    Case(512, 768, 30001, BF16, "mulrow:0 mulcol:1 mul:0.5 addcol:0", grads="smooth", weighted=True),
    Case(130, 256, 5000, BF16, k=3),
    Case(130, 256, 5000, BF16, k=0),
    Case(130, 256, 5000, F32, k=3, grads="stats"),
)


def by_autograd(head: Head, g: RowGrads, dtype: torch.dtype | None) -> tuple[RowStats, list[Tensor]]:
    """Statistics and gradients by autograd: in float64 (``dtype``), or as eager code computes them (None)."""
    h, w = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (head.h, head.w))
    vectors = [x.detach().to(dtype or F32).requires_grad_() for x in (head.cols, head.rows)]
    stats_head = Head(h, w, head.y, *vectors, head.u.to(dtype or F32), head.transform)
    raw = h @ w.t()
    stats = _stats_of(raw.float() if dtype is None else raw, stats_head)
    loss = torch.zeros((), device=h.device, dtype=stats.lse.dtype)
    for name in DIFFERENTIABLE_STATS:
        if getattr(g, name) is not None:
            loss = loss + (getattr(g, name).to(loss.dtype) * getattr(stats, name)).sum()
    if g.square is not None:
        loss = loss + (g.square.to(loss.dtype) * stats.lse**2).sum()
    grads = torch.autograd.grad(loss, [h, w, *vectors], allow_unused=True, materialize_grads=True)
    return RowStats(*(None if x is None else x.detach() for x in stats)), [x.detach() for x in grads]


def _stats_of(raw: Tensor, head: Head) -> RowStats:
    """Statistics of given raw logits [N, V], in their dtype."""
    z = apply(head.transform.smooth, raw, head.cols, head.rows)
    lse = z.logsumexp(1)
    logp = z - lse[:, None]
    total = z @ head.u if head.u.numel() else z.sum(1)
    p = logp.exp()
    mean = (p * logp).sum(1)
    variance = (p * logp**2).sum(1) - mean**2
    return RowStats(lse, z.gather(1, head.y), total, -mean, z.amax(1), z.argmax(1), variance=variance)


def error(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true.double()).norm() / true.double().norm().clamp_min(1e-300))


SLACK = 1e-7  # of float32 statistics whose eager error may by luck be nothing


def ratios(c: Case, device: str) -> dict[str, float]:
    """Our error over eager's, for every result of this case."""
    head = make_head(c, device)
    g = make_grads(c, head)
    windows = Windows(c.tokens or c.n, c.kept or c.v, F32)
    if c.grads == "stats":
        windows = Windows(c.tokens or c.n, 8192, F32)
        stats = engine.head_stats(head, frozenset(STATS), windows)
        grads = engine.head_stats_backward(head, g, stats, Needs(True, True, True, True), windows)
    else:
        stats, grads = engine.head_loss(head, g, OPERANDS, windows)
    true, d_true = by_autograd(head, g, torch.float64)
    theirs, d_theirs = by_autograd(head, g, None)
    by_name = {}
    for name in DIFFERENTIABLE_STATS:
        ours, exact = getattr(stats, name), getattr(true, name)
        if ours is not None and exact.numel():
            by_name[name] = (error(ours, exact), error(getattr(theirs, name), exact))
    for name, ours, exact, other in zip(("dh", "dw", "dcols", "drows"), grads, d_true, d_theirs):
        if ours is not None and exact.any():
            by_name[name] = (error(ours, exact), error(other, exact))
    slack = dict.fromkeys(by_name, SLACK)
    if c.grads == "stats" and c.dtype == F32:
        # p = exp(z - lse) carries the rounding of a float32 lse near 16
        slack |= dict.fromkeys(("dh", "dw", "dcols", "drows"), 1e-6)
    return {name: max(ours - slack[name], 0) / max(other, 1e-30) for name, (ours, other) in by_name.items()}


def errors_do_not_exceed_eager(device: str, cases: tuple[Case, ...] = CASES) -> Iterator[tuple[str, bool]]:
    for c in cases:
        got = ratios(c, device)
        text = "  ".join(f"{name} {value:.2f}" for name, value in got.items())
        yield f"{c}: {text}", all(value <= 1.0 for value in got.values())


def extremes_are_right(device: str) -> Iterator[tuple[str, bool]]:
    """Rows that exponentials cannot hold, common offsets, masked columns, rows that are not finite."""
    for dtype in (BF16, F16, F32):
        c = Case(300, 256, 5003, dtype, "addcol:0")
        head, g = make_head(c, device), make_grads(c, make_head(c, device))
        tail = (torch.arange(c.v, device=device) >= 4000).float()
        for name, transform, vector in (
            ("rows that span 300", "addcol:0", torch.linspace(-150, 150, c.v, device=device)),
            ("offset 1e4", "addcol:0", torch.full((c.v,), 1e4, device=device)),
            ("offset -1e4", "addcol:0", torch.full((c.v,), -1e4, device=device)),
            ("p(target) -> 1", "addcol:0", torch.zeros(c.v, device=device)),
            ("tail at -inf", "addcol:0", torch.where(tail > 0, -torch.inf, 0.0)),
            ("tail dropped", "dropcol:0", tail),
            ("tail dropped after a soft cap", f"{SOFTCAP} dropcol:0", tail),
            ("tail set to -30", "setcol:0", torch.where(tail > 0, -30.0, torch.nan)),
            ("plain rows that span hundreds", "", torch.zeros(c.v, device=device)),
        ):
            vectors = torch.stack((vector, vector))
            x = head._replace(cols=vectors, y=head.y.clamp(max=3999), transform=parse(transform))
            if not transform:
                x = x._replace(h=head.h * 32)
            if name == "p(target) -> 1":
                x.cols[0, 11] = 60
                x.y[:] = 11
            stats, grads = engine.head_loss(x, g, OPERANDS, Windows(c.n, c.v, F32))
            true, d_true = by_autograd(x, g, torch.float64)
            theirs, d_theirs = by_autograd(x, g, None)
            e = [error(stats.lse, true.lse)] + [error(a, b) for a, b in zip(grads[:2], d_true)]
            o = [error(theirs.lse, true.lse)] + [error(a, b) for a, b in zip(d_theirs[:2], d_true)]
            # an eager result can be exact by luck: then a float32 rounding is allowed
            small = (1e-7, 1e-6, 1e-6)
            if name == "p(target) -> 1":
                ok = all(bool(x.isfinite().all()) for x in grads[:2])
                ok &= float((grads.h.double() - d_true[0]).abs().max()) <= 3e-7 * float(g.lse.max()) * 30
            else:
                ok = all(a <= b + s for a, b, s in zip(e, o, small))
            numbers = " ".join(f"{a:.1e}/{b:.1e}" for a, b in zip(e, o))
            yield f"{name} {dtype}: lse dh dw {numbers}", ok
        x = head._replace(h=head.h.clone())
        x.h[5], x.h[9, 3] = torch.nan, torch.inf
        stats = engine.head_stats(x, frozenset(STATS), Windows(c.n, c.v, F32))
        wide = x._replace(cols=x.cols.double(), rows=x.rows.double(), u=x.u.double())
        true = _stats_of(x.h.double() @ x.w.double().t(), wide)
        bad = torch.tensor([5, 9], device=device)
        fine = torch.ones(c.n, dtype=torch.bool, device=device).index_fill(0, bad, False)
        ok = bool(stats.lse[fine].isfinite().all()) and error(stats.lse[fine], true.lse[fine]) < 1e-5
        ok &= not bool(stats.lse[bad].isfinite().any())
        yield f"rows that are not finite stay alone {dtype}", ok


def decisions_match_eager(device: str) -> Iterator[tuple[str, bool]]:
    """argmax on logits as the program rounds them, first index on ties (coarse operands: many ties)."""
    for dtype in (BF16, F16):
        name = str(dtype).removeprefix("torch.")
        c = Case(400, 64, 20011, dtype, f"round:{name}")
        head = make_head(c, device, peaked=False)
        head = head._replace(h=(head.h * 4).round() / 4, w=(head.w * 8).round() / 8)  # exact products, exact sums
        got = engine.head_stats(head, frozenset({"max", "argmax"}), Windows(c.n, c.v, F32))
        z = head.h @ head.w.t()
        tied = (z == z.amax(1, keepdim=True)).float()
        ok = torch.equal(got.argmax, tied.argmax(1)) and torch.equal(got.max, z.amax(1).float())
        yield f"argmax and max {dtype}, {float(tied.sum(1).mean()):.1f} ties a row", ok


def runs(c: Case, device: str) -> tuple[Callable[[], list[Tensor]], Head]:
    head = make_head(c, device)
    g = make_grads(c, head)
    w = Windows(c.tokens or c.n, c.v, BF16)

    def step() -> list[Tensor]:
        stats, grads = engine.head_loss(head, g, OPERANDS, w)
        again = engine.head_stats(head, frozenset(STATS), w)
        back = engine.head_stats_backward(head, g, again, OPERANDS, Windows(c.n, 8192, F32))
        part = engine.head_loss(head, g, OPERANDS, Windows(c.tokens or c.n, c.v // 3 // 64 * 64, BF16))[1]
        results = [stats.lse, stats.picked, grads.h, grads.w, again.entropy, again.argmax, back.h, back.w]
        return [*results, part.h, part.w]

    return step, head


def nothing_synchronises(device: str) -> Iterator[tuple[str, bool]]:
    c = Case(1000, 512, 20000, BF16, tokens=512)
    step, head = runs(c, device)
    first = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield "no host synchronisation", True
    yield "two runs agree bit for bit", all(torch.equal(a, b) for a, b in zip(first, second))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    head.h.copy_(head.h.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    fresh = step()
    yield "a captured CUDA graph follows its inputs", all(torch.equal(a, b) for a, b in zip(captured, fresh))


def large_windows_index_right(device: str) -> Iterator[tuple[str, bool]]:
    """One window of more than 2^31 logits."""
    c = Case(17408, 64, 128256, BF16)
    head = make_head(c, device)
    g = make_grads(c, head)
    stats, grads = engine.head_loss(head, g, OPERANDS, Windows(c.n, c.v, F32))
    rows = slice(c.n - 300, c.n)
    tail = head._replace(h=head.h[rows], y=head.y[rows], rows=head.rows[:, rows])
    some = RowGrads(*(None if x is None else x[rows] for x in g))
    true, d_true = by_autograd(tail, some, torch.float64)
    _, d_theirs = by_autograd(tail, some, None)
    e, o = error(grads.h[rows], d_true[0]), error(d_theirs[0], d_true[0])
    yield f"2^31 logits in a window: dh of the last rows {e:.1e}/{o:.1e}", e <= o
    yield "2^31 logits in a window: lse of the last rows", error(stats.lse[rows], true.lse) < 1e-6
    yield "2^31 logits in a window: dw is finite", bool(grads.w.isfinite().all())


BAD_LABEL = """
import torch
from fusedhead.kernels.triton_engine import engine
from fusedhead.kernels.transform.transform import apply, parse
from fusedhead.kernels.contract import Head, Windows
h, w = torch.randn(8, 64, device="cuda"), torch.randn(99, 64, device="cuda")
e = torch.empty(0, device="cuda")
y = torch.full((8, 1), 99, device="cuda")
head = Head(h, w, y, e, e, e, parse(""))
engine.head_stats(head, frozenset({"lse", "picked"}), Windows(8, 99, torch.float32))
torch.cuda.synchronize()
"""


def labels_out_of_range_assert(device: str) -> Iterator[tuple[str, bool]]:
    done = subprocess.run([sys.executable, "-c", BAD_LABEL], capture_output=True, text=True)
    said = done.stdout + done.stderr
    yield "a label out of range fails a device assertion", done.returncode != 0 and "out of range" in said


CLAIMS = (
    *(partial(errors_do_not_exceed_eager, cases=(c,)) for c in CASES),
    extremes_are_right,
    decisions_match_eager,
    nothing_synchronises,
    large_windows_index_right,
    labels_out_of_range_assert,
)


def check_claims(device: str, share: str) -> bool:
    fine, (first, step) = True, (int(x) for x in share.split("/"))
    for claim in CLAIMS[first::step]:
        try:
            for text, ok in claim(device):
                fine &= ok
                print("ok  " if ok else "FAIL", text, flush=True)
        except Exception as problem:
            fine = False
            print("FAIL", claim, type(problem).__name__, str(problem)[:600], flush=True)
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", default="0/1", help="i/n: every n-th claim from the i-th")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    sys.exit(not check_claims("cuda", options.share))


if __name__ == "__main__":
    main()

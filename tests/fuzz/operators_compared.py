"""Programs of `operators`, compiled with the pass, against eager code: every result and every gradient.

How far a result may be off is measured: what a change of the inputs in their last place does to eager code, for a few
such changes, and some units in the last place. An op that decides by comparing (``sort``, ``floor``) or divides by
what is nearly nothing is so allowed what its own rounding does, and no other.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fusedhead import Report
from tests.eager_stack import backend
from tests.fuzz.operators import Case, fresh

ULPS = 64
DISTURBED = 6  # changes of the inputs in their last place
BEYOND = 8.0  # how many times what they do to eager code is allowed


@dataclass(frozen=True)
class Verdict:
    """``kind``: "" when all is well, "skipped" where eager code or Dynamo alone cannot run the program."""

    kind: str
    detail: str
    report: Report


def step(case: Case, model: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Any]:
    """The leaves of a program's results, then the gradients of its inputs; a random one is the same every time."""
    torch.manual_seed(2)
    result = model(*inputs)
    if case.rest is not None:
        result = case.rest(result, *inputs)
    results = tree_leaves(result)
    roots = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
    leaves = [x for x in inputs if x.requires_grad]
    upstream = []
    for i, root in enumerate(roots):
        generator = torch.Generator().manual_seed(i)
        upstream.append((torch.rand(root.shape, generator=generator) + 0.5).to(root.dtype))
    grads = torch.autograd.grad(roots, leaves, upstream, allow_unused=True) if roots and leaves else ()
    return [*results, *grads]


def attempt(case: Case, model: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Any] | Exception:
    try:
        return step(case, model, inputs)
    except Exception as error:
        return error


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors where both are finite, in float64."""
    a, b = a.detach(), b.detach()
    if a.shape != b.shape or not a.numel():
        return 0.0
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    result = (a.to(wide) - b.to(wide)).abs()
    return result[result.isfinite()].max().item() if bool(result.isfinite().any()) else 0.0


def finite(x: Tensor) -> Tensor:
    return x.detach().isfinite() if x.is_floating_point() or x.is_complex() else torch.ones_like(x, dtype=torch.bool)


def differs(i: int, got: Any, eager: Any, near: list[Any], rounding: float = 0.0) -> str:
    """ "" where one result agrees with eager code's, else a sentence. ``near``: eager code's of disturbed inputs.

    ``rounding``: relative, of the coarsest dtype that the program computes in.
    """
    if isinstance(eager, (float, complex)) and type(got) is type(eager):
        got, eager = torch.tensor(got), torch.tensor(eager)
        near = [torch.tensor(x) for x in near if isinstance(x, (float, complex))]
    if not isinstance(eager, Tensor) or not isinstance(got, Tensor):
        return "" if type(got) is type(eager) and (got == eager or got != got) else f"{i}: {got!r}, eager {eager!r}"
    for what in ("dtype", "shape", "requires_grad", "layout"):
        if getattr(got, what) != getattr(eager, what) and (
            what != "shape" or all(x.shape == eager.shape for x in near if isinstance(x, Tensor))
        ):
            return f"{i}: {what} {getattr(got, what)} instead of {getattr(eager, what)}"
    if got.shape != eager.shape or eager.layout is not torch.strided or not eager.numel():
        return ""
    others = [x for x in near if isinstance(x, Tensor) and x.shape == eager.shape]
    settled = finite(eager)
    steady = torch.ones_like(settled)
    for x in others:
        steady &= finite(x) == settled
    if bool(((finite(got) != settled) & steady).any()):
        return f"{i}: not finite where eager code is, or the reverse"
    moved = max((distance(x, eager) for x in others), default=0.0)
    if not (eager.is_floating_point() or eager.is_complex() or eager.dtype == torch.bool):
        return "" if torch.equal(got, eager) else f"{i}: other integers"
    size = eager.detach().abs()[settled].max().item() if eager.dtype != torch.bool and bool(settled.any()) else 1.0
    allowed = BEYOND * moved + max(ULPS * torch.finfo(torch.float32).eps, rounding) * max(1.0, float(size))
    off = distance(got, eager)
    return "" if off <= allowed else f"{i}: {off:.3g} off, {allowed:.3g} allowed, size {float(size):.3g}"


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    """As a compiler sees them: the first size of the first one is a symbol, where the program says so."""
    inputs = fresh(case)
    if case.dynamic and inputs[0].ndim:
        torch._dynamo.maybe_mark_dynamic(inputs[0], 0)
    return inputs


def compare(case: Case) -> Verdict:
    """One program with the pass, its rewritten graphs executed as they are, against eager code."""
    report = Report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eager = attempt(case, case.model, fresh(case))
        torch.compiler.reset()
        compiled = torch.compile(case.model, backend=backend(report.extend, **{"fusedhead.min_logits": 0}))
        got = attempt(case, compiled, inputs_of(case))
        if report.errors:
            return Verdict("the pass raised", report.errors[0], report)
        if isinstance(eager, Exception):
            alike = isinstance(got, Exception)
            return Verdict("skipped" if alike else "does not raise", f"{eager!r}"[:300], report)
        if isinstance(got, Exception):
            torch.compiler.reset()
            alone = attempt(case, torch.compile(case.model, backend="eager"), inputs_of(case))
            if isinstance(alone, Exception) and type(alone) is type(got):
                return Verdict("skipped", f"{got!r}"[:300], report)
            return Verdict("raises", "".join(traceback.format_exception(got))[-3000:], report)
        result = differ(got, eager, [])
        if result:
            near = [attempt(case, case.model, fresh(case, seed)) for seed in range(1, DISTURBED + 1)]
            result = differ(got, eager, [x for x in near if isinstance(x, list)])
        if result:
            torch.compiler.reset()
            alone = attempt(case, torch.compile(case.model, backend="eager"), inputs_of(case))
            if isinstance(alone, list) and differ(alone, eager, []):
                return Verdict("skipped", f"Dynamo alone: {result}", report)
    return Verdict("differs" if result else "", result, report)


def differ(got: list[Any], eager: list[Any], near: list[list[Any]]) -> str:
    if len(got) != len(eager):
        return f"{len(got)} results instead of {len(eager)}"
    dtypes = {x.dtype for x in eager if isinstance(x, Tensor) and x.is_floating_point()}
    rounding = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    rows = (
        differs(i, a, b, [x[i] for x in near if len(x) == len(eager)], rounding)
        for i, (a, b) in enumerate(zip(got, eager))
    )
    return next(filter(None, rows), "")

"""Whether a compiled program did what eager PyTorch does, by the error rule.

For every output, every gradient and every input that the program writes to: same dtype, shape and requires_grad;
NaN and infinities where eager code (or the truth) has them; and

    max |got - truth|  <=  max |eager - truth| + slack

with the truth in float64 and slack = `ULPS` units in the last place of float32, relative to the larger of
the largest true entry and 1; where a program computes in bfloat16 anywhere, two units of bfloat16 are added, because
a single number of eager code may be right by luck. A program that raises in eager code must raise the same class
when compiled. This file draws nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend

from fusedhead import Report
from fusedhead.backend import compile_with
from tests.eager_stack import as_it_is, backend
from tests.fuzz.program import Case, make_inputs, program, truth

ULPS = 16
VERSION = "modified by an inplace operation"  # an error of eager autograd that compiled programs do not always have
TWINS_OWN = (VERSION, "view size is not compatible")  # errors of the float64 twin alone, whose casts change nothing
# Where the gradient of rounded logits goes hangs on how they compare: other roundings, other routes.
ROUTES = (".sort(", ".topk(", ".amax(", ".max(", ".relu(", "clamp", ".kthvalue(")
CHANGED_DECISIONS = 0.25  # share of a low-precision output that may differ where it hangs on comparisons of logits


@dataclass(frozen=True)
class Ran:
    """What a run left behind: named tensors, or the exception it ended with."""

    tensors: dict[str, Any]
    error: Exception | None = None


@dataclass(frozen=True)
class Verdict:
    """``kind`` is "" when all is well, else the kind of difference; ``detail`` is for people."""

    kind: str
    detail: str
    report: Report


def run(fn: Callable[..., Any], case: Case, sizes: dict[str, int], *, double: bool = False) -> Ran:
    """Forward and backward of one program."""
    inputs = make_inputs(case, sizes, double=double)
    operands = [x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in inputs]
    autocast = case.ambient_autocast and not double
    torch.manual_seed(2)
    try:
        with (
            torch.no_grad() if case.no_grad else nullcontext(),
            torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(),
        ):
            outputs = fn(*operands)
        tensors: dict[str, Any] = {}
        roots, upstream = [], []
        for i, (name, out) in enumerate(zip(case.returns, outputs)):
            tensors[name] = out
            if isinstance(out, Tensor) and out.requires_grad:
                generator = torch.Generator().manual_seed(i)
                weight = torch.rand(out.shape, generator=generator, dtype=torch.float32) + 0.5
                roots.append(out)
                upstream.append(weight.to(out.dtype))
        leaves = {n: x for n, x in zip(case.inputs, operands) if isinstance(x, Tensor) and x.requires_grad}
        if roots and leaves:
            grads = torch.autograd.grad(roots, list(leaves.values()), upstream, allow_unused=True)
            tensors |= {f"d{name}": grad for name, grad in zip(leaves, grads)}
        tensors |= {f"{n} afterwards": x.detach() for n, x in zip(case.inputs, operands) if isinstance(x, Tensor)}
        return Ran(tensors)
    except Exception as error:
        return Ran({}, error)


def worst(a: Tensor, b: Tensor, where: Tensor) -> float:
    return (a.double() - b.double())[where].abs().max().item() if bool(where.any()) else 0.0


def same(name: str, got: Any, eager: Any, true: Any, case: Case) -> str:
    """ "" when one tensor agrees, else a sentence."""
    if not isinstance(eager, Tensor) or not isinstance(got, Tensor):
        return "" if type(got) is type(eager) and got == eager else f"{name}: {got!r} instead of {eager!r}"
    for what in ("dtype", "shape", "requires_grad"):
        if getattr(got, what) != getattr(eager, what):
            return f"{name}.{what}: {getattr(got, what)} instead of {getattr(eager, what)}"
    got, eager, true = got.detach(), eager.detach(), true.detach()
    low = case.dtype != "float32" or case.ambient_autocast or "torch.bfloat16" in str(case)
    if not eager.is_floating_point():
        differ = (got != eager).double().mean().item() if eager.numel() else 0.0
        allowed = max(CHANGED_DECISIONS, 1 / max(1, eager.numel())) if low and name in case.decisions else 0.0
        return "" if differ <= allowed else f"{name}: {differ:.0%} of the entries differ"
    routed = name in case.decisions or (name.startswith("d") and any(op in str(case) for op in ROUTES))
    if low and routed:
        return ""
    odd = ~eager.isfinite() | ~true.isfinite()
    regular = got.isfinite()
    wrong = (~regular & ~odd) | (regular & ~eager.isfinite() & ~true.isfinite())
    if bool(wrong.any()):
        return f"{name}: not finite where eager code is, or the reverse: {got.tolist()} instead of {eager.tolist()}"
    both = eager.isfinite() & true.isfinite() & regular
    ours, theirs = worst(got, true, both), worst(eager, true, both)
    size = max(1.0, true[both].abs().max().item() if bool(both.any()) else 0.0)
    slack = ULPS * torch.finfo(torch.float32).eps * size
    if low:
        slack += 2 * torch.finfo(torch.bfloat16).eps * size
    if ours <= theirs + slack:
        return ""
    return f"{name}: error {ours:.3g}, eager's error {theirs:.3g}, slack {slack:.1g}, size {size:.3g}"


def compiled_by(stack: str, case: Case, report: Report) -> Callable[..., Any]:
    """The program compiled: "eager" runs the rewritten graph as it is, "aot" and "inductor" hand it on."""
    options: dict[str, Any] = {"fusedhead.logits": case.logits, "fusedhead.min_logits": 0}
    if stack in ("eager", "aot"):
        compiler = as_it_is if stack == "eager" else lookup_backend("aot_eager")
        own = backend(report.extend, compiler, **options)
        return torch.compile(program(case), backend=own, dynamic=case.dynamic or None)
    options["fallback_random"] = True  # the random numbers of eager code

    def inductor(gm: Any, example_inputs: Any) -> Any:
        return compile_with(gm, example_inputs, options=options, observe=report.extend)

    return torch.compile(program(case), backend=inductor, dynamic=case.dynamic or None)


def second_sizes(case: Case) -> dict[str, int]:
    return {**case.sizes, "B": case.sizes["B"] + 2, "T": case.sizes["T"] + 3}


def compare(case: Case, stack: str = "eager") -> Verdict:
    """Compile and run a program, and hold it against eager code and the truth."""
    torch.compiler.reset()
    report = Report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fn = compiled_by(stack, case, report)
        for sizes in (case.sizes, second_sizes(case)) if case.dynamic else (case.sizes,):
            ours = run(fn, case, sizes)
            if report.errors:
                eager = run(program(case), case, sizes)
                return Verdict(f"the pass raised (eager code: {type(eager.error).__name__})", report.errors[0], report)
            if not any(head.fused for head in report.heads):
                return Verdict("", "", report)
            result = differs(case, sizes, ours)
            if result is not None:
                return Verdict(*result, report)
    return Verdict("", "", report)


def differs(case: Case, sizes: dict[str, int], ours: Ran) -> tuple[str, str] | None:
    """The first difference of one run, as (kind, detail)."""
    eager = run(program(case), case, sizes)
    if eager.error is not None:
        return wrong_exception(case, sizes, ours, eager.error)
    if ours.error is not None and isinstance(under_dynamo(case, sizes).error, type(ours.error)):
        return None  # tracing alone makes the error
    if ours.error is not None:
        return f"raises {type(ours.error).__name__}", str(ours.error)[:2000]
    true = run(truth(case), case, sizes, double=True)
    if true.error is not None and not any(text in str(true.error) for text in TWINS_OWN):
        return "the float64 twin raises", repr(true.error)
    for name, value in eager.tensors.items():
        sentence = same(name, ours.tensors.get(name), value, true.tensors.get(name, value), case)
        if sentence:
            return "differs", sentence
    return None


def under_dynamo(case: Case, sizes: dict[str, int]) -> Ran:
    """The program traced and run as it is."""
    torch.compiler.reset()
    return run(torch.compile(program(case), backend="eager", dynamic=case.dynamic or None), case, sizes)


def wrong_exception(case: Case, sizes: dict[str, int], ours: Ran, expected: Exception) -> tuple[str, str] | None:
    """Eager code raises: the compiled program must too, in the class it has under Dynamo."""
    if isinstance(ours.error, type(expected)) or (ours.error is None and VERSION in str(expected)):
        return None
    dynamo = under_dynamo(case, sizes)
    if ours.error is None and dynamo.error is None:
        return None  # tracing alone removes the error
    if ours.error is not None and isinstance(ours.error, type(dynamo.error)):
        return None
    return "wrong exception", f"{ours.error!r} instead of {expected!r} (Dynamo: {dynamo.error!r})"

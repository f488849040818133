"""Three claims about a small program under the backend: left alone, not seen, right.

Whatever is claimed, the outputs, the gradients and the inputs afterwards must be eager PyTorch's. Programs run with
the pass and without Inductor; float32, so the tolerance is a few roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fusedhead import Report
from tests.eager_stack import Rewritten

B, T, D, V = 2, 5, 4, 11
Program = Callable[..., Any]


def hidden(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, T, D)), requires_grad=True)


def weight(*shape: int) -> Tensor:
    return torch.nn.Parameter(torch.randn(*(shape or (V, D))) * 0.5)


def labels(*shape: int, high: int = V) -> Tensor:
    return torch.randint(0, high, shape or (B, T))


def fresh(inputs: Sequence[Any]) -> list[Any]:
    """Copies to run on, so that a program that writes to its inputs can be run twice."""
    return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]


def outcome(fn: Program, inputs: Sequence[Any]) -> list[Any]:
    """Outputs, gradients and inputs afterwards; gradients from differently weighted outputs."""
    operands = fresh(inputs)
    torch.manual_seed(1)
    outputs = [x for x in tree_leaves(fn(*operands)) if isinstance(x, Tensor)]
    differentiable = [x for x in outputs if x.requires_grad]
    leaves = [x for x in operands if isinstance(x, Tensor) and x.requires_grad]
    grads: Sequence[Any] = ()
    if differentiable and leaves:
        upstream = [torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape) for x in differentiable]
        grads = torch.autograd.grad(differentiable, leaves, upstream, allow_unused=True)
    kept = [x.detach() for x in operands if isinstance(x, Tensor)]
    return [*(x.detach() for x in outputs), [x.requires_grad for x in outputs], *grads, *kept]


def compiled(fn: Program, inputs: Sequence[Any], **compile_options: Any) -> Report:
    """The report of ``fn``, once it is shown to do what eager code does."""
    torch.compiler.reset()
    expected = outcome(fn, inputs)
    rewritten = Rewritten(fn, **compile_options)
    got = outcome(rewritten, inputs)
    assert not rewritten.report.errors, rewritten.report.errors
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        if isinstance(b, Tensor) and b.is_floating_point():
            assert a is not None
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, equal_nan=True)
        else:
            assert type(a) is type(b)
            assert torch.equal(a, b) if isinstance(b, Tensor) else a == b
    return rewritten.report


def left(fn: Program, *inputs: Any, because: str, **compile_options: Any) -> None:
    """A head is seen, left as it is, and the report says why."""
    report = compiled(fn, inputs, **compile_options)
    assert report.heads, "no head is seen"
    assert not any(head.fused for head in report.heads), f"fused:\n{report}"
    reasons = [head.reason for head in report.heads]
    assert any(because in reason for reason in reasons), reasons


def unseen(fn: Program, *inputs: Any, **compile_options: Any) -> None:
    """Nothing in the program looks like a head."""
    report = compiled(fn, inputs, **compile_options)
    assert not report.heads, str(report)


def not_fused(fn: Program, *inputs: Any, **compile_options: Any) -> None:
    report = compiled(fn, inputs, **compile_options)
    assert not any(head.fused for head in report.heads), str(report)


def right(fn: Program, *inputs: Any, fused: int = 1, **compile_options: Any) -> Report:
    """So many heads are fused, and the numbers are eager's."""
    report = compiled(fn, inputs, **compile_options)
    assert sum(head.fused for head in report.heads) == fused, str(report)
    return report

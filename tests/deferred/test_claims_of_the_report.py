"""What the report claims of deferred logits, held against what a watcher of every call sees, for random programs.

``FUSEDHEAD_CLAIMS=500 python -m pytest tests/deferred/test_claims_of_the_report.py`` looks at more of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from fusedhead.deferred.tensor import DeferredLogits
from fusedhead.report.summary import Summary
from tests.eager_stack import backend

PROGRAMS = int(os.environ.get("FUSEDHEAD_CLAIMS", "10"))
N, D, V = 24, 8, 1024

USES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "loss": F.cross_entropy,
    "loss per token": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "log-probability": lambda z, y: z.log_softmax(-1).gather(-1, y[:, None]),
    "normaliser": lambda z, y: torch.logsumexp(z, -1),
    "decision": lambda z, y: z.argmax(-1),
    "shifted loss": lambda z, y: F.cross_entropy(z[:-1], y[1:]),
    "scaled loss": lambda z, y: F.cross_entropy(z / 2, y),
    "shape": lambda z, y: z.shape[0] + z.ndim,
    "view": lambda z, y: z.view(2, -1, V).shape,
    "singular values": lambda z, y: torch.linalg.svdvals(z.detach()),
    "sum over tokens": lambda z, y: z.cumsum(0)[-1],
    "write": lambda z, y: z.detach().mul_(2),
    "nothing": lambda z, y: None,
}


class Watch(TorchDispatchMode):
    """The calls, other than the heads' own ops, that make a tensor of all logits."""

    def __init__(self) -> None:
        super().__init__()
        self.large: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for outcome in result if isinstance(result, (tuple, list)) else (result,):
            real = isinstance(outcome, Tensor) and not isinstance(outcome, (DeferredLogits, FakeTensor))
            if real and outcome.device.type == "cpu" and outcome.numel() >= (N - 1) * V and outcome.shape[-1:] == (V,):
                self.large.append(str(func))
        return result


def loss_inside(h: Tensor, w: Tensor, y: Tensor) -> Any:
    return F.cross_entropy(F.linear(h, w), y)


def returned(h: Tensor, w: Tensor, y: Tensor) -> Any:
    return F.linear(h, w)


def both(h: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(h, w)
    return F.cross_entropy(z, y), z


def dynamic(h: Tensor, w: Tensor, y: Tensor) -> Any:
    return F.linear(h, w).tanh()


@pytest.mark.parametrize("worker", range(2))
def test_what_is_claimed_is_what_was_seen(worker: int) -> None:
    for number in range(PROGRAMS // 2):
        chance = random.Random(f"{worker}:{number}")
        torch.compiler.reset()
        summary = Summary()
        program = chance.choice([loss_inside, returned, both, dynamic])
        seen = Watch()

        def watched(gm: GraphModule, inputs: Any, seen: Watch = seen) -> Callable[..., Any]:
            def run(*operands: Any) -> Any:
                with seen:  # Dynamo compiles nothing under a mode, so it is entered here
                    return gm.forward(*operands)

            return run

        compiled = torch.compile(program, backend=backend(summary.add, watched))
        built = 0
        for call in range(chance.randint(1, 3)):
            h, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
            y, uses = torch.randint(0, V, (N,)), chance.choices(list(USES), k=chance.randint(0, 3))
            seen.large.clear()
            out = compiled(h, w, y)
            z = out[1] if isinstance(out, tuple) else out
            with seen:
                values = [USES[use](z, y) for use in uses] if program is not loss_inside else []
            said = f"{worker}:{number}.{call} {program.__name__} {uses}"
            plain = program(h, w, y)
            plain = plain[1] if isinstance(plain, tuple) else plain
            for use, value in zip(uses, values):
                torch.testing.assert_close(value, USES[use](plain, y), msg=said, atol=1e-4, rtol=1e-4)
            (head,) = summary.heads()
            now = head.run.built.total
            assert (now > built) == bool(seen.large), f"{said}: {seen.large}, {head.remarks()}"
            built = now
        (head,) = summary.heads()
        assert head.fused
        assert head.materialised == bool(built)
        held = head.bytes_logits if built else head.workspace_bytes
        assert head.bytes_saved == N * V * 4 - held
        line = f"{head.bytes_saved / 2**20:,.1f} MiB"
        assert line in str(head)
        assert line in str(summary)

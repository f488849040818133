"""What this torch can do that an older one cannot, asked of torch itself and not of its version.

A test whose program an older Dynamo breaks apart asks here, and asserts in either case what is true there: the numbers
always, what is fused where the graph is whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def in_one_graph(program: Callable[..., Any], *inputs: Any, **settings: Any) -> bool:
    """Whether Dynamo captures a program whole, and without one of the errors of its own."""
    torch.compiler.reset()
    try:
        with warnings.catch_warnings(), torch._dynamo.config.patch(**settings):
            warnings.simplefilter("ignore")
            torch.compile(program, backend="eager", fullgraph=True)(*inputs)
    except torch._dynamo.exc.TorchDynamoException:
        return False
    finally:
        torch.compiler.reset()
    return True


@cache
def masks_counted_apart() -> bool:
    """Whether two results of one mask, each with a size that the data decide, may meet in a loss."""

    def program(z: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return F.cross_entropy(z[mask.view(-1)], y[mask.view(-1)])

    inputs = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), torch.tensor([True, True, False, True])
    return in_one_graph(program, *inputs, capture_dynamic_output_shape_ops=True)


def gathered_along_classes() -> bool:
    """Whether a functional all-gather along another dimension than the first is captured, in the group that is up."""
    from torch.distributed._functional_collectives import all_gather_tensor

    return in_one_graph(lambda z: all_gather_tensor(z, -1, dist.group.WORLD) + 1, torch.randn(2, 3))


@cache
def hook_op() -> str:
    """What takes a tensor that a compiled function hooks: to an older Dynamo, an autograd function."""
    names: list[str] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        names.extend(getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes)
        return gm.forward

    def program(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda g: g * 2)
        return y.exp()

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(program, backend=backend)(torch.randn(3, requires_grad=True))
    torch.compiler.reset()
    return "register_hook" if "register_hook" in names else "autograd_function_apply"

"""What FSDP2 and DDP put around a model's outputs: effects at the start of a backward, and no new numbers.

| who   | what it does to an output                                    | when it has to take effect                   |
|-------|--------------------------------------------------------------|----------------------------------------------|
| FSDP2 | a hook on its gradient, which gathers the unit's weights     | before a gradient reaches the unit's weights |
| DDP   | an autograd node that returns a copy, and whose backward     | before a gradient reaches the model          |
|       | queues what runs when the backward ends                      |                                              |

A loss's gradient passes deferred logits by, on its way to what they are made of. So the effects go there: to the hooks
of the leaves, through which every gradient of the model comes, whatever was made of the logits. Neither looks at the
gradient's numbers. Anything else that hooks or wraps an output has the logits built. This file knows torch's
wrappers by their names and modules: one of another name is anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

FSDP2 = ("torch.distributed.fsdp._fully_shard.", "_pre_backward")
DDP = ("torch.nn.parallel.distributed", "_DDPSink")

Hook = Callable[[Tensor], Any]


def is_gathering(hook: Any) -> bool:
    """Whether a hook is FSDP2's, which gathers a unit's weights and hands the gradient on."""
    owner = getattr(hook, "__self__", None)
    module, name = FSDP2
    return getattr(hook, "__name__", "") == name and any(c.__module__.startswith(module) for c in type(owner).__mro__)


def sink_of(grad_fn: Any) -> Hook | None:
    """What an autograd node of DDP does in a backward, as a hook; None for any other node."""
    function = getattr(type(grad_fn), "_forward_cls", None)
    if (getattr(function, "__module__", ""), getattr(function, "__name__", "")) != DDP:
        return None

    def queue(gradient: Tensor) -> None:
        function.backward(grad_fn, None)  # type: ignore[union-attr]  # it queues once, and hands gradients on

    return queue


def before_leaves(leaves: Sequence[Tensor], hook: Hook) -> Any:
    """Run a hook when a gradient reaches one of the leaves. Returns the handle of one of them."""
    handles = [leaf.register_hook(hook) for leaf in leaves if leaf.requires_grad]
    return handles[0] if handles else None

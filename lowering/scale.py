"""The op that multiplies a computed gradient by the gradient of the loss, out of place and in place.

    scale(Tensor x, Tensor g) -> Tensor         g·x, a new tensor
    scale_(Tensor(a!)[] xs, Tensor g) -> ()     in place, for several; no memory traffic where g is 1

The autograd formula of `head_loss` calls the first; a compiled backward that owns the saved gradient gets the second
(`fusedhead.inductor.scale_in_place`). g is a 0-d tensor of any floating dtype; the product is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.chips import triton_serves

# |g - 1| below which g·x rounds back to x, whatever x: less than half a unit in the last place
UNMOVED = {torch.bfloat16: 2.0**-11, torch.float16: 2.0**-14}
LIBRARY = torch.library.Library("fusedhead", "FRAGMENT")
LIBRARY.define("scale(Tensor x, Tensor g) -> Tensor")
LIBRARY.define("scale_(Tensor(a!)[] xs, Tensor g) -> ()")


def _scaled(x: Tensor, g: Tensor) -> Tensor:
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return (x.to(wide) * g.to(wide)).to(x.dtype)


def _out_of_place(x: Tensor, g: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    _in_place([out], g)
    return out


def _in_place(xs: list[Tensor], g: Tensor) -> None:
    """Scale in place. Two gradients of one dtype share a launch, since launches are most of the cost for few tokens."""
    launched: dict[torch.dtype, list[Tensor]] = {}
    for x in xs:
        if x.is_cuda and x.is_contiguous() and x.dtype != torch.float64 and triton_serves():
            launched.setdefault(x.dtype, []).append(x)
        else:
            _one_in_place(x, g)
    for dtype, same in launched.items():
        from fusedhead.kernels.triton_engine.rows.scale import scale_pair_in_place

        for at in range(0, len(same), 2):
            scale_pair_in_place(same[at], same[at + 1] if at + 1 < len(same) else None, g, UNMOVED.get(dtype, 0.0))


def _one_in_place(x: Tensor, g: Tensor) -> None:
    if x.device.type != "cpu":
        x.copy_(_scaled(x, g))
    elif not abs(float(g.to(torch.float32)) - 1) <= UNMOVED.get(x.dtype, 0.0):  # the CPU can read the number
        for part in x.view(-1).split(1 << 18) if x.is_contiguous() else (x,):
            part.copy_(_scaled(part, g))


LIBRARY.impl("scale", _out_of_place, "CompositeExplicitAutograd")
LIBRARY.impl("scale_", _in_place, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedhead::scale", lib=LIBRARY)
def _fake_scale(x: Tensor, g: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fusedhead::scale_", lib=LIBRARY)
def _fake_scale_(xs: list[Tensor], g: Tensor) -> None:
    return None

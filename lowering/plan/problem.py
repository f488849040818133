"""The types of the planner: `Problem`, one head to compute, and `Candidate`, one way to compute it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedhead.kernels.contract import OPERAND_NEEDS, Needs, Windows
from fusedhead.kernels.transform.transform import Transform

AUTO, LEAST_MEMORY = 0, -1  # values of the option `memory` other than a budget in MiB
MIB = 1 << 20
NO_TRANSFORM = Transform()


class Problem(NamedTuple):
    """The properties of a head that a plan depends on."""

    tokens: int  # N
    vocab: int  # V
    hidden: int  # D
    dtype: torch.dtype  # of h and w
    device_type: str
    products: torch.dtype  # of the torch engine's matrix products (`product_dtypes`)
    needs: Needs = OPERAND_NEEDS  # operands that want a gradient from this call; none for statistics only
    linear: bool = True  # whether coefficients are known before the sweep
    row_scale: bool = True  # whether gradients are a row scale away from exponentials
    explicit: bool = False  # whether a sweep writes out dz or all logits (`writes_logits`)
    transform: Transform = NO_TRANSFORM
    labels: int = 1  # K
    sums: bool = False  # whether Σ u z takes part in the loss
    float8: bool = False  # whether products of gradients may be float8, and the kernels for it serve
    threads: int = 0  # of the torch engine's C++ kernel on a CPU, 0 where there is none; `plan` finds out

    @property
    def narrow(self) -> bool:
        """Whether an element has two bytes."""
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def one_pass(self) -> bool:
        """Whether the sweep for the statistics can compute the gradients too."""
        return self.linear and self.row_scale


class Candidate(NamedTuple):
    """One way to compute a head."""

    algorithm: str  # of the table in `plan.plan`
    windows: Windows
    workspace_bytes: int  # at the peak, without operands and results


def writes_logits(want: frozenset[str], transform: Transform) -> bool:
    """Whether the torch engine writes out logits for statistics: for all but those of one softmax and plain sums."""
    short = {"lse", "lse_low", "picked"} | ({"sum", "spread"} if transform.plain_scale is not None else set())
    return not want <= short

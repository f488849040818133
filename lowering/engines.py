"""The engines that compute heads, the preferred first: what each serves, how it may do it, and its three functions.

An engine's kernels are imported when a head is first computed by them. To add an engine, write a class with the members
of `Engine` and put an instance into `ENGINES`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from fusedhead.kernels.chips import float8_serves, triton_serves
from fusedhead.kernels.contract import Head, HeadGrads, Needs, OtherColumns, RowGrads, RowStats, Windows
from fusedhead.kernels.torch_engine import softmax_gradients
from fusedhead.lowering.plan import torch as torch_plan
from fusedhead.lowering.plan import triton as triton_plan
from fusedhead.lowering.plan.problem import Candidate, Problem

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Engine(Protocol):
    """An engine computes heads of some dtypes on some devices. The last three functions are those of the contract."""

    @property
    def name(self) -> str:
        """As reports say it."""
        ...

    @property
    def for_few_logits(self) -> Engine | None:
        """The engine for heads of so few logits that all of them may be built."""
        ...

    @property
    def keeps_product(self) -> bool:
        """Whether ``product`` [N, V] has a meaning: `head_stats` fills it with h wᵀ, its backward pass reads that."""
        ...

    def supports(self, dtype: torch.dtype, device_type: str) -> bool: ...

    def candidates(self, problem: Problem, memory: int, budget: int | None) -> tuple[list[Candidate], int | None]:
        """Ways to compute a head, the preferred first, and the bytes that they should fit in, None for any."""
        ...

    def row_scale_serves(self, head: Head, grads: RowGrads, needs: Needs) -> bool:
        """Whether gradients of this head are a row scale away from exponentials."""
        ...

    def float8_serves(self, head: Head | None) -> bool:
        """Whether it has kernels for float8 products of gradients on this GPU, and takes this head's matrices."""
        ...

    def head_stats(
        self, head: Head, want: frozenset[str], windows: Windows, product: Tensor | None = None
    ) -> RowStats: ...

    def head_stats_backward(
        self,
        head: Head,
        upstream: RowGrads,
        stats: RowStats,
        needs: Needs,
        windows: Windows,
        product: Tensor | None = None,
    ) -> HeadGrads: ...

    def other_columns_serve(self, head: Head, coefficients: RowGrads, needs: Needs, windows: Windows) -> bool:
        """Whether `head_loss` takes the lse of columns that the head does not hold."""
        ...

    def head_loss(
        self,
        head: Head,
        coefficients: RowGrads,
        needs: Needs,
        windows: Windows,
        other_columns: OtherColumns | None = None,
    ) -> tuple[RowStats, HeadGrads]: ...


@cache
def _module(name: str) -> ModuleType:
    return import_module(f"fusedhead.kernels.{name}")


class _Kernels:
    """The three functions of an engine out of the module that has them."""

    module: str  # in fusedhead.kernels
    keeps_product = False

    def float8_serves(self, head: Head | None) -> bool:
        return False

    def head_stats(self, head: Head, want: frozenset[str], windows: Windows, product: Tensor | None = None) -> RowStats:
        kept = () if product is None else (product,)
        stats: RowStats = _module(self.module).head_stats(head, want, windows, *kept)
        return stats

    def head_stats_backward(
        self,
        head: Head,
        upstream: RowGrads,
        stats: RowStats,
        needs: Needs,
        windows: Windows,
        product: Tensor | None = None,
    ) -> HeadGrads:
        kept = () if product is None else (product,)
        grads: HeadGrads = _module(self.module).head_stats_backward(head, upstream, stats, needs, windows, *kept)
        return grads

    def other_columns_serve(self, head: Head, coefficients: RowGrads, needs: Needs, windows: Windows) -> bool:
        return False

    def head_loss(
        self,
        head: Head,
        coefficients: RowGrads,
        needs: Needs,
        windows: Windows,
        other_columns: OtherColumns | None = None,
    ) -> tuple[RowStats, HeadGrads]:
        asked = () if other_columns is None else (other_columns,)
        results: tuple[RowStats, HeadGrads] = _module(self.module).head_loss(head, coefficients, needs, windows, *asked)
        return results


class TorchWhole(_Kernels):
    """All logits at once, in the calls of torch that the plain program would make."""

    name, module, for_few_logits = "torch whole", "torch_engine.whole", None
    keeps_product = True
    candidates = staticmethod(torch_plan.whole_candidates)
    row_scale_serves = staticmethod(softmax_gradients.supports)

    def supports(self, dtype: torch.dtype, device_type: str) -> bool:
        return True


class TorchWindows(_Kernels):
    """Torch ops window by window, on every device that torch runs on."""

    name, module, for_few_logits = "torch windows", "torch_engine.engine", TorchWhole()
    candidates = staticmethod(torch_plan.torch_candidates)
    row_scale_serves = staticmethod(softmax_gradients.supports)

    def supports(self, dtype: torch.dtype, device_type: str) -> bool:
        return True

    def other_columns_serve(self, head: Head, coefficients: RowGrads, needs: Needs, windows: Windows) -> bool:
        return bool(_module(self.module).other_columns_serve(head, coefficients, needs, windows))


class TritonWindows(_Kernels):
    """Triton sweeps and cuBLAS products. Its kernels are few for small heads as they are."""

    name, module, for_few_logits = "triton windows", "triton_engine.engine", None
    candidates = staticmethod(triton_plan.triton_candidates)

    def supports(self, dtype: torch.dtype, device_type: str) -> bool:
        return device_type == "cuda" and dtype in TRITON_DTYPES and triton_serves()

    def row_scale_serves(self, head: Head, grads: RowGrads, needs: Needs) -> bool:
        return not (needs.cols or needs.rows)

    def other_columns_serve(self, head: Head, coefficients: RowGrads, needs: Needs, windows: Windows) -> bool:
        one_pass = _module("triton_engine.single_pass")
        return bool(one_pass.other_columns_serve(head, coefficients, needs, windows))

    def float8_serves(self, head: Head | None) -> bool:
        serves = float8_serves(None if head is None else head.h.device)
        return serves and (head is None or bool(_module("triton_engine.float8.single_pass").reads(head)))


ENGINES: tuple[Engine, ...] = (TritonWindows(), TorchWindows())


def engine_for(dtype: torch.dtype, device_type: str) -> Engine:
    """The first engine that serves the device and has the dtype."""
    return next(engine for engine in ENGINES if engine.supports(dtype, device_type))

"""From a Head (or a slice of one) to the arguments of a sweep: tile, schedule, operands, and what kernels share.

`Sweep` is one kernel's view of one window of a head. The function that launches a kernel stands below it in the
kernel's own file; none of them synchronises, tunes or depends on values, so that every launch can be captured in a
CUDA graph. This file must not know which kernel is launched when (`triton_windows` does).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedhead.kernels.contract import Head
from fusedhead.kernels.triton_product import Operands, operands, readable_by_tma
from fusedhead.kernels.triton_schedule import Schedule, schedule
from fusedhead.kernels.triton_tiles import Tile, device_of, tile_for

TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SLOTS = 16  # partial rows that a kernel reads at once


def matmul_precision() -> str:
    """ "tf32" or "ieee": how float32 products run, by torch's own setting for CUDA matmuls."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


class Sweep(NamedTuple):
    """One window of a head (all tensors sliced to it) as one persistent kernel sees it."""

    head: Head
    tile: Tile
    schedule: Schedule
    operands: Operands
    precision: str

    @property
    def labels(self) -> int:
        return min(self.head.y.shape[1], 2)


def sweep(kernel: str, head: Head, want: frozenset[str] = frozenset()) -> Sweep:
    """The sweep of ``kernel`` ("stream", "exp", "dlogits") over z [N, V] of this (sliced) head; N, V >= 1."""
    tokens, hidden = head.h.shape
    major, multiprocessors = device_of(head.h.device)
    precision = matmul_precision() if head.h.dtype == torch.float32 else "ieee"
    tma = readable_by_tma(head.h, head.w, major)
    tile = tile_for(kernel, tokens, hidden, head.h.element_size(), major, precision, tma)
    if tile.BN >= 256 and (head.transform.smooth.steps or want & {"sum", "entropy", "max", "argmax"}):
        tile = tile._replace(parts=4)  # a longer epilogue would not fit the registers in wider parts
    plan = schedule(tokens, len(head.w), tile, multiprocessors * tile.resident)
    return Sweep(head, tile, plan, operands(head.h, head.w, tile, tma), precision)


def _stride(x: Tensor) -> int:
    return x.stride(0) if x.dim() == 2 else 0


def shared_arguments(s: Sweep) -> dict[str, Any]:
    """Arguments that every sweeping kernel takes."""
    h, w, y, cols, rows, u, _ = s.head
    return {
        "h": s.operands.h,
        "w": s.operands.w,
        "y": y,
        "label_map": y,
        "u": u,
        "cols": cols,
        "rows": rows,
        "N": h.shape[0],
        "V": w.shape[0],
        "D": h.shape[1],
        "K": y.shape[1],
        "GROUP": s.schedule.group,
        "sh0": s.operands.strides[0],
        "sh1": s.operands.strides[1],
        "sw0": s.operands.strides[2],
        "sw1": s.operands.strides[3],
        "sy0": y.stride(0),
        "sy1": y.stride(1),
        "stride_cols": _stride(cols),
        "stride_rows": _stride(rows),
        "LABELS": s.labels,
        "HAS_U": u.numel() > 0,
        "PRECISE": h.dtype == torch.float32,
        "PRECISION": s.precision,
        "TMA": s.operands.TMA,
        "W_BY_ROWS": s.operands.W_BY_ROWS,
        "BM": s.tile.BM,
        "BN": s.tile.BN,
        "BK": s.tile.BK,
        "FLATTEN": s.tile.flatten,
        "PARTS": s.tile.parts,
        "num_warps": s.tile.warps,
        "num_stages": s.tile.stages,
    }


def marks(s: Sweep, flags: Tensor | None) -> dict[str, Any]:
    """Arguments of a sweep that may be restricted to the token blocks that ``flags`` marks (None: all)."""
    if flags is None:
        return {"flags": s.head.y, "ONLY": False, "EVEN": len(s.head.w) % s.tile.BN == 0}
    return {"flags": flags, "ONLY": True, "EVEN": len(s.head.w) % s.tile.BN == 0, "FLATTEN": False}


def window_descriptor(s: Sweep, window: Tensor) -> TensorDescriptor:
    """The window [n, ld] as a kernel stores it: tiles clipped at the V columns that exist."""
    shape = [len(s.head.h), len(s.head.w)]
    return TensorDescriptor(window, shape, [window.stride(0), 1], [s.tile.BM, s.tile.BN // s.tile.parts])

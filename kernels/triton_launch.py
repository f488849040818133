"""From a Head (or a slice of one) to kernel launches: tile, schedule, operands, and the arguments kernels
share.

`Sweep` is one kernel's view of one window of a head; the functions below launch one kernel each and allocate
its small outputs. Nothing here synchronises, tunes or depends on values, so every launch can be captured in a
CUDA graph. This file must not know in which order kernels run or how gradients accumulate (`triton_windows`
does).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedhead.kernels.contract import Head, RowGrads
from fusedhead.kernels.triton_dlogits import dlogits_kernel
from fusedhead.kernels.triton_exp import exp_kernel
from fusedhead.kernels.triton_finalize import check_kernel, finalize_kernel, scale_kernel
from fusedhead.kernels.triton_labels import check_labels_kernel, map_labels_kernel
from fusedhead.kernels.triton_merge import merge_kernel
from fusedhead.kernels.triton_product import Operands, operands, readable_by_tma
from fusedhead.kernels.triton_reference import reference_kernel
from fusedhead.kernels.triton_schedule import Schedule, schedule
from fusedhead.kernels.triton_stream import stream_kernel
from fusedhead.kernels.triton_tiles import Tile, device_of, tile_for
from fusedhead.kernels.triton_transform import steps_of, varies_along_row

TRITON_DTYPE = {
    torch.float32: triton.language.float32,
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
}


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
    plan = schedule(tokens, len(head.w), tile, multiprocessors)
    return Sweep(head, tile, plan, operands(head.h, head.w, tile, tma), precision)


def _stride(x: Tensor) -> int:
    return x.stride(0) if x.dim() == 2 else 0


def _shared(s: Sweep) -> dict[str, Any]:
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


def _marks(s: Sweep, flags: Tensor | None) -> dict[str, Any]:
    if flags is None:
        return {"flags": s.head.y, "ONLY": False, "EVEN": len(s.head.w) % s.tile.BN == 0}
    return {"flags": flags, "ONLY": True, "EVEN": len(s.head.w) % s.tile.BN == 0, "FLATTEN": False}


def check_labels(y: Tensor, vocab: int) -> None:
    """Device assertion that every label names a column."""
    if y.numel():
        rows = 256
        check_labels_kernel[(triton.cdiv(len(y), rows),)](
            y, len(y), vocab, y.shape[1], y.stride(0), y.stride(1), ROWS=rows
        )


def map_labels(s: Sweep, first_col: int = 0) -> Tensor:
    """[token blocks, tiles] int32: which parts of which tiles hold a label, counted from ``first_col``."""
    y, tiles = s.head.y, triton.cdiv(len(s.head.w), s.tile.BN)
    label_map = y.new_empty((s.schedule.blocks, tiles), dtype=torch.int32)
    map_labels_kernel[(s.schedule.blocks, triton.cdiv(tiles, 64))](
        y,
        label_map,
        len(y),
        tiles,
        y.shape[1],
        first_col,
        y.stride(0),
        y.stride(1),
        BM=s.tile.BM,
        WIDTH=s.tile.BN // s.tile.parts,
        PARTS=s.tile.parts,
        TILES=64,
    )
    return label_map


def stream(s: Sweep, want: frozenset[str], picked: Tensor | None, flags: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Partial rows ([4, size] float32, [2, size] int32) of a sweep; ``picked`` [N, K] float32 is filled."""
    top = bool(want & {"max", "argmax"})
    count = 4 if "sum" in want else 3 if "entropy" in want else 2
    part = s.head.h.new_empty((count, s.schedule.size), dtype=torch.float32)
    part_top = s.head.h.new_empty((2, s.schedule.size) if top else (0,), dtype=torch.int32)
    arguments = _shared(s) | _marks(s, flags)
    if picked is None:
        arguments["LABELS"] = 0
    else:
        arguments["label_map"] = map_labels(s)
    stream_kernel[(s.schedule.programs,)](
        **arguments,
        picked=part if picked is None else picked,
        part=part,
        part_top=part_top,
        size=s.schedule.size,
        STEPS=steps_of(s.head.transform if top else s.head.transform.smooth),
        SUM="sum" in want,
        ENTROPY="entropy" in want,
        TOP=top,
    )
    return part, part_top


MERGE_ROWS, MERGE_SLOTS = 16, 16


def _merge(s: Sweep, part: Tensor, part_top: Tensor, outputs: dict[str, Any]) -> None:
    unused = {"flags": part, "ref2_out": part, "lse_out": part, "entropy_out": part}
    unused |= {"sum_out": part, "max_out": part, "argmax_out": part_top}
    constants = {"SHIFT": 0.0, "REF": False, "ONLY": False, "SUM": False, "ENTROPY": False, "TOP": False}
    n = len(s.head.h)
    merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](
        part=part,
        part_top=part_top,
        N=n,
        V=len(s.head.w),
        P=s.schedule.programs,
        GROUP=s.schedule.group,
        size=s.schedule.size,
        BM=s.tile.BM,
        BN=s.tile.BN,
        ROWS=MERGE_ROWS,
        SLOTS=MERGE_SLOTS,
        num_warps=1,
        **(unused | constants | outputs),
    )


def merge_statistics(s: Sweep, part: Tensor, part_top: Tensor, want: frozenset[str]) -> dict[str, Tensor]:
    """lse, and what is wanted of sum, entropy, max and argmax, each [N], by name."""
    n, new = len(s.head.h), s.head.h.new_empty
    top = bool(want & {"max", "argmax"})
    got = {"lse": new(n, dtype=torch.float32)}
    got |= {k: new(n, dtype=torch.float32) for k in ("sum", "entropy") if k in want}
    got |= {"max": new(n, dtype=torch.float32), "argmax": new(n, dtype=torch.int64)} if top else {}
    outputs: dict[str, Any] = {f"{name}_out": out for name, out in got.items()}
    constants = {"SUM": "sum" in want, "ENTROPY": "entropy" in want, "TOP": top}
    _merge(s, part, part_top, outputs | constants)
    return {name: out for name, out in got.items() if name == "lse" or name in want}


def merge_reference(s: Sweep, part: Tensor, ref2: Tensor, shift: float, flags: Tensor | None = None) -> None:
    """ref2 [N] <- base-2 lse + shift, for the token blocks that ``flags`` marks (None: all)."""
    marks = {} if flags is None else {"flags": flags, "ONLY": True}
    _merge(s, part, part, {"ref2_out": ref2, "REF": True, "SHIFT": shift, **marks})


def reference(s: Sweep, ref2: Tensor) -> None:
    """ref2 [N] <- the target logit of each row in base 2 (column 0 where there are no labels)."""
    a, rows = _shared(s), 4
    names = (
        "y",
        "cols",
        "rows",
        "N",
        "V",
        "D",
        "sh0",
        "sh1",
        "sw0",
        "sw1",
        "sy0",
        "stride_cols",
        "stride_rows",
    )
    reference_kernel[(triton.cdiv(a["N"], rows),)](
        h=s.head.h,
        w=s.head.w,
        ref2=ref2,
        STEPS=steps_of(s.head.transform.smooth),
        LABELS=s.labels,
        PRECISE=a["PRECISE"],
        ROWS=rows,
        INNER=512,
        **{name: a[name] for name in names},
    )


def window_descriptor(s: Sweep, window: Tensor) -> TensorDescriptor:
    """The window [n, ld] as a kernel stores it: tiles clipped at the V columns that exist."""
    shape = [len(s.head.h), len(s.head.w)]
    return TensorDescriptor(window, shape, [window.stride(0), 1], [s.tile.BM, s.tile.BN // s.tile.parts])


def exponentials(
    s: Sweep,
    window: Tensor,
    ref2: Tensor,
    picked: Tensor,
    slope: Tensor,
    part: Tensor,
    label_map: Tensor | None,
    flags: Tensor | None = None,
) -> None:
    """window [N, ld] <- E; part [1 or 2, size] <- totals (and Σ u z); picked, slope [N, K] at the labels."""
    exp_kernel[(s.schedule.programs,)](
        **(_shared(s) | _marks(s, flags) | ({} if label_map is None else {"label_map": label_map})),
        E=window_descriptor(s, window),
        ref2=ref2,
        picked=picked,
        slope=slope,
        part=part,
        size=s.schedule.size,
        STEPS=steps_of(s.head.transform.smooth),
        SUM=len(part) == 2,
        VARYING=varies_along_row(s.head.transform),
        DTYPE=TRITON_DTYPE[window.dtype],
    )


def mark_unsafe(s: Sweep, part: Tensor) -> Tensor:
    """flags [token blocks] int32: 1 where a row's total says that its exponentials left the safe range."""
    flags = part.new_empty(s.schedule.blocks, dtype=torch.int32)
    check_kernel[(s.schedule.blocks,)](
        part,
        flags,
        len(s.head.h),
        len(s.head.w),
        s.schedule.programs,
        s.schedule.group,
        BM=s.tile.BM,
        BN=s.tile.BN,
        SLOTS=MERGE_SLOTS,
    )
    return flags


def finalize(
    s: Sweep,
    window: Tensor,
    ref2: Tensor,
    picked: Tensor,
    slope: Tensor,
    part: Tensor,
    coefficients: RowGrads,
    lse: Tensor,
    total: Tensor | None,
    sh: Tensor | None,
    gain: float,
) -> Tensor:
    """Row results and the target entries; returns scale [N] float32 with dz = scale ⊙ window."""
    a = _shared(s)
    names = ("y", "rows", "N", "V", "D", "K", "GROUP", "sy0", "sy1", "stride_rows", "LABELS", "BM", "BN")
    scale = torch.empty_like(lse)
    finalize_kernel[(a["N"],)](
        part=part,
        ref2=ref2,
        E=window,
        h=s.head.h,
        sh0=s.head.h.stride(0),
        sh1=s.head.h.stride(1),
        picked=picked,
        slope=slope,
        c_lse=lse if coefficients.lse is None else coefficients.lse,
        c_picked=lse if coefficients.picked is None else coefficients.picked,
        c_square=lse if coefficients.square is None else coefficients.square,
        lse=lse,
        sum_out=lse if total is None else total,
        scale=scale,
        sh=scale if sh is None else sh,
        P=s.schedule.programs,
        size=s.schedule.size,
        ld=window.stride(0),
        STEPS=steps_of(s.head.transform.smooth),
        VARYING=varies_along_row(s.head.transform),
        HAS_LSE=coefficients.lse is not None,
        HAS_PICKED=coefficients.picked is not None and s.labels > 0,
        HAS_SQUARE=coefficients.square is not None,
        SUM=total is not None,
        NEED_W=sh is not None,
        GAIN=gain,
        LIMIT=2.0**14 if window.dtype == torch.float16 else 1e20,
        DTYPE=TRITON_DTYPE[window.dtype],
        SLOTS=MERGE_SLOTS,
        INNER=1024,
        **{name: a[name] for name in names},
    )
    return scale


def scale_rows(product: Tensor, scale: Tensor, out: Tensor, rank_one: tuple[Tensor, Tensor] | None) -> None:
    """out [N, D] <- scale ⊙ product + r ⊗ b; product [N, D] float32 (or out itself), both contiguous."""
    r, b = rank_one or (scale, scale)
    scale_kernel[(len(out),)](
        product, scale, r, b, out, out.shape[0], out.shape[1], RANK_ONE=rank_one is not None, INNER=1024
    )


def dlogits(
    s: Sweep, window: Tensor, upstream: RowGrads, lse: Tensor, entropy: Tensor | None, first_col: int,
    need_cols: bool, need_rows: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """window [N, ld] <- dz; returns partial sums of the vectors' gradients [steps, ., V], [steps, ., N]."""
    n, vocab = len(s.head.h), len(s.head.w)
    steps = steps_of(s.head.transform.smooth)
    parts = -(-vocab // s.tile.BN) * s.tile.parts
    part_cols = lse.new_empty((len(steps) // 2, s.schedule.blocks, vocab) if need_cols else (0,))
    part_rows = lse.new_empty((len(steps) // 2, parts, n) if need_rows else (0,))
    arguments = _shared(s)
    if upstream.picked is None:
        arguments["LABELS"] = 0
    else:
        arguments["label_map"] = map_labels(s, first_col)
    dlogits_kernel[(s.schedule.programs,)](
        **arguments,
        dz=window_descriptor(s, window),
        g_lse=lse if upstream.lse is None else upstream.lse,
        g_picked=lse if upstream.picked is None else upstream.picked,
        g_sum=lse if upstream.sum is None else upstream.sum,
        g_entropy=lse if upstream.entropy is None else upstream.entropy,
        lse=lse,
        entropy=lse if entropy is None else entropy,
        part_cols=part_cols,
        part_rows=part_rows,
        first_col=first_col,
        rows_size=parts,
        STEPS=steps,
        HAS_LSE=upstream.lse is not None,
        HAS_SUM=upstream.sum is not None,
        HAS_ENTROPY=upstream.entropy is not None,
        NEED_COLS=need_cols,
        NEED_ROWS=need_rows,
        DTYPE=TRITON_DTYPE[window.dtype],
    )
    return part_cols, part_rows

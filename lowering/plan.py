"""Which engine, which algorithm and which windows a head is computed with."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedhead.kernels.contract import Windows


class Plan(NamedTuple):
    engine: str
    algorithm: str
    windows: Windows
    predicted_bytes: int
    predicted_flop: int
    reason: str


def plan(N: int, V: int, D: int, dtype: torch.dtype, device_type: str, **_: object) -> Plan:
    windows = Windows(tokens=256, vocab=max(V, 1), accumulate=torch.float32)
    return Plan("torch_windows", "recompute", windows, 256 * V * 4, 8 * N * V * D, "")

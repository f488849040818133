"""Rates of matrix products on some chips, for lower bounds of time. No decision reads them.

A measured row has the rate of bare products of a head's sizes in ``benchmarks/results``. A row that was not measured
has the maker's rate for dense products, times the fraction that the measured H100 reached. The text of an estimate says
which of the two it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

TERA = 1e12
REACHED = 0.72  # of the 989 TFLOP/s stated for the H100 SXM


class Chip(NamedTuple):
    name: str
    device: str  # of torch
    flop_per_second: Mapping[str, float]  # by the dtype of the operands
    source: str


def _stated(name: str, tera: float) -> Chip:
    rate = REACHED * tera * TERA
    return Chip(
        name, "cuda", {"bfloat16": rate, "float16": rate},
        f"{REACHED:.0%} of the {tera:g} TFLOP/s that its maker states, the share that a measured H100 reached",
    )  # fmt: skip


MEASURED = "the median of the bare products of training steps in benchmarks/results/head.json, 645 to 795"
CHIPS = {
    "h100": Chip("H100 SXM", "cuda", {"bfloat16": 715 * TERA, "float16": 715 * TERA}, MEASURED),
    "h200": _stated("H200", 989),
    "b200": _stated("B200", 2250),
    "a100": _stated("A100", 312),
    "l40s": _stated("L40S", 362),
    "mi300x": _stated("MI300X", 1307),
    "cpu": Chip("CPU", "cpu", {}, "no rate is known of a CPU"),
}


def chip_named(name: str | None) -> Chip:
    """The chip of a name; for None this machine's GPU if it is in the table, else an H100. Raises ValueError."""
    if name is not None:
        if name.lower() not in CHIPS:
            raise ValueError(f"fusedhead: unknown chip {name!r}; the known ones are {', '.join(CHIPS)}")
        return CHIPS[name.lower()]
    if torch.cuda.is_available():
        device_name = torch.cuda.get_device_name().lower()
        match = next((chip for key, chip in CHIPS.items() if key in device_name.replace(" ", "")), None)
        return match or Chip(torch.cuda.get_device_name(), "cuda", {}, "no rate is known of this chip")
    return CHIPS["h100"]

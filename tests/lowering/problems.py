"""Problems for the planner: sizes of known models, what is differentiated, and the plan of a problem."""

from __future__ import annotations

import torch

from fusedhead.kernels.contract import Needs
from fusedhead.kernels.transform.transform import parse
from fusedhead.lowering.plan.plan import Plan, plan
from fusedhead.lowering.plan.problem import Problem

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NOTHING = Needs(False, False, False, False)
HIDDEN = Needs(True, False, False, False)
BOTH = Needs(True, True, False, False)
LLAMA, GEMMA, QWEN, GPT2 = (8192, 128256, 4096), (8192, 256000, 2304), (8192, 151936, 1024), (16384, 50304, 768)
WIDENED = {"products": FP32}
SQUARE = parse("fn:mul(z,z);#0|mul(2.0,z);mul(g,#0);#1")
SIZES = ((1, 32000, 512), (7, 507, 123), (1024, 32000, 512), (2048, 50304, 768), LLAMA, (1 << 20, 1 << 18, 8192))


def planned(n: int, v: int, d: int, dtype: torch.dtype, device: str, **options) -> Plan:
    """The plan where products are computed as on a CPU that multiplies bfloat16, unless the options say otherwise."""
    products = FP32 if dtype == FP16 and device != "cuda" else dtype
    asked = {name: options.pop(name) for name in ("memory", "free_bytes", "whole_below") if name in options}
    return plan(Problem(n, v, d, dtype, device, **{"products": products, **options}), **asked)

"""Calling heads below autograd: a pass over graphs that Inductor is about to compile.

Their gradients have been traced, so that no call in them is differentiated again. An op with an autograd formula asks
for it at every call all the same, in Python, which costs the host as much as all of its checks.
"""

from __future__ import annotations

import torch
from torch.fx import Graph

from fusedhead.lowering.ops import SCHEMAS


def call_below_autograd(graph: Graph) -> None:
    """Each call of a head's op becomes one of the same op without an autograd formula."""
    ops = torch.ops.fusedhead
    for name in SCHEMAS:
        for node in graph.find_nodes(op="call_function", target=getattr(ops, name).default):
            node.target = getattr(ops, f"{name}_traced").default

"""A pass on Inductor's graphs: calls heads below autograd.

The gradients in these graphs have been traced, so that no call is differentiated again. An op with an autograd formula
still runs its setup in Python at every call, which costs the host as much as all of its checks.
"""

from __future__ import annotations

import torch
from torch.fx import Graph

from fusedhead.lowering.ops import SCHEMAS


def call_below_autograd(graph: Graph) -> None:
    """Replace each call of a head's op by the variant without an autograd formula."""
    ops = torch.ops.fusedhead
    for name in SCHEMAS:
        for node in graph.find_nodes(op="call_function", target=getattr(ops, name).default):
            node.target = getattr(ops, f"{name}_traced").default

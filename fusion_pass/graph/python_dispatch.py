"""The Python dispatcher for fake values of symbolic size, as Dynamo uses it.

Some C++ kernels take no symbols: ``addcmul`` raises on an operand that it would broadcast. Dynamo and AOTAutograd
run every op under torch's Python dispatcher, and so must the pass where a size of the graph is a symbol. The backend
enters it once for a whole graph, and no pass enters it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.fx import Graph

from fusedhead.compat import enable_python_dispatcher, tree_leaves
from fusedhead.graph.nodes import fake


def symbolic(graph: Graph) -> bool:
    """Whether a value in a graph is a symbol, or has a size that is one."""
    for node in graph.nodes:
        value = fake(node)
        for each in (value,) if isinstance(value, Tensor) else tree_leaves(value):
            for size in each.shape if isinstance(each, Tensor) else (each,):
                if type(size) is torch.SymInt:
                    return True
    return False


def python_dispatch(graph: Graph) -> AbstractContextManager[object]:
    """Context in which ops on fake values of symbolic size run under the Python dispatcher."""
    return enable_python_dispatcher() if symbolic(graph) else nullcontext()

"""The Python dispatcher for fake values of symbolic size, as Dynamo uses it.

Some kernels in C++ take no symbols: ``addcmul`` raises there with an operand that it broadcasts. Dynamo and AOTAutograd
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
    values = [x for node in graph.nodes for x in tree_leaves(fake(node))]
    sizes = (size for x in values if isinstance(x, Tensor) for size in x.shape)
    return any(isinstance(x, torch.SymInt) for x in (*values, *sizes))


def python_dispatch(graph: Graph) -> AbstractContextManager[object]:
    """Context in which ops on fake values of symbolic size run under the Python dispatcher."""
    return enable_python_dispatcher() if symbolic(graph) else nullcontext()

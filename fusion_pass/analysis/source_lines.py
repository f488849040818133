"""The source line and the module of a node, as a user would look for them.

A projection is often made by a helper that every linear layer passes through, or by the forward of a layer's own class.
Heads and layers then have the same line, and the caller's line tells them apart. Dynamo records both (``stack_trace``,
``nn_module_stack``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from fusedhead.graph.nodes import SOURCE_INTERNALS, name_of
from fusedhead.graph.op_names import PROJECTIONS

FORWARD = ("forward", "__call__")  # a module's call is no helper


class Frame(NamedTuple):
    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f"{self.file.rsplit('/', 1)[-1]}:{self.line}"


def frames(node: Node) -> list[Frame]:
    """The frames of the program that made a node, the outermost first."""
    return parsed(node.meta.get("stack_trace") or "")


@lru_cache(maxsize=4096)  # the products of a graph are looked at for every head
def parsed(trace: str) -> list[Frame]:
    return [Frame(*entry) for entry in re.findall(r'^\s*File "(.*)", line (\d+), in (.*)$', trace, re.MULTILINE)]


def modules(node: Node) -> list[tuple[str, str, Any]]:
    """(key, path, class) of the modules that made a node, the outermost first; a path is "heads.2"."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, module_spelling(str(entry[0])), entry[1]) for key, entry in stack.items()]


def module_spelling(source: str) -> str:
    """ "L['self'].heads.2" or "L['self']._modules['lm_head']" as a user would write it from the outermost module.

    A wrapper of a method has the module as the first of its ``*args``.
    """
    parts = re.findall(r"\w+", re.sub(r"^(?:L\['args'\]\[0\]|[LG]\['?\w+'?\])", "", source))
    return ".".join(part for part in parts if part not in SOURCE_INTERNALS)


def module_path(node: Node) -> str:
    """The path of the module that made a node, "" where none did or the compiled module itself."""
    stack = modules(node)
    return stack[-1][1] if stack else ""


def products_of(graph: Graph) -> list[Node]:
    """The products of a graph, whose lines a head's line is compared with."""
    return [node for node in graph.nodes if name_of(node) in PROJECTIONS]


def place(node: Node, products: Sequence[Node] | None = None) -> str:
    """ "model.py:30 (lm_head)": the line that distinguishes a head from other layers, and its module.

    ``products``: those of its graph, given where many places are asked for.
    """
    frame, path = caller(node, products_of(node.graph) if products is None else products), module_path(node)
    line = str(frame) if frame is not None else node.name
    return f"{line} ({path})" if path else line


def caller(node: Node, products: Sequence[Node]) -> Frame | None:
    """The innermost frame that is neither a helper of several layers nor the forward of a class of linear layers."""
    trace = frames(node)
    if not trace:
        return None
    layers = [other for other in products if other is not node]
    at = len(trace) - 1
    if is_layer_frame(node, layers):
        at = next((i for i in range(at, 0, -1) if trace[i].function in FORWARD), at + 1) - 1
    while at and trace[at].function not in FORWARD and is_a_helper(trace, at, layers):
        at -= 1
    return trace[at]


def is_layer_frame(node: Node, layers: Sequence[Node]) -> bool:
    """Whether the innermost module is a linear layer of the program's own: it computes one product, with its own
    weight.
    """
    stack = modules(node)
    if not stack or str(getattr(stack[-1][2], "__module__", stack[-1][2])).startswith("torch."):
        return False
    key, path, _ = stack[-1]
    weights = (parameter(source) for source in node.all_input_nodes[1:])
    return any(w.rpartition(".")[0] == path and w for w in weights) and not any(
        (stack := modules(other)) and stack[-1][0] == key for other in layers
    )


def parameter(node: Node) -> str:
    """The path of the graph input that a weight is a view or a cast of."""
    while node.op.startswith("call_") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return module_spelling(name() if callable(name) else str(name))


def is_a_helper(trace: Sequence[Frame], at: int, layers: Sequence[Node]) -> bool:
    """Whether another product has the same line and another caller."""
    for other in layers:
        theirs = frames(other)
        if any(frame == trace[at] and theirs[:i] != trace[:at] for i, frame in enumerate(theirs)):
            return True
    return False

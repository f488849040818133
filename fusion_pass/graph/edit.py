"""Edits of a graph: erase dead nodes, replace a node by another, copy a module, count edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fusedhead.compat import make_graph_module, use_lazy_graph_module


def erase(nodes: Iterable[Node], removable: Callable[[Node], bool]) -> None:
    """Erase nodes without users, and then the removable inputs that have lost their last user."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if not node._erased and not node.users and removable(node):
            sources = node.all_input_nodes
            node.graph.erase_node(node)
            stack.extend(sources)


def replace_node(node: Node, by: Node) -> None:
    """Replace all uses of a node by another node, and erase it."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def any_still_computed(nodes: Iterable[Node]) -> bool:
    """Whether any of some nodes is still in its graph and has users."""
    return any(not node._erased and node.users for node in nodes)


# The hooks that a GraphModule runs when a node of its graph is made or erased.
EDIT_HOOKS = ("_create_node_hooks", "_erase_node_hooks")


@contextmanager
def counting_edits(graph: Graph, count: Callable[[Node], None]) -> Iterator[bool]:
    """Context in which ``count`` is called for every node created or erased; yields False where torch cannot tell."""
    hooks = [getattr(graph.owning_module, name, None) for name in EDIT_HOOKS]
    lists = [hook for hook in hooks if isinstance(hook, list)]
    for each in lists:
        each.append(count)
    try:
        yield len(lists) == len(EDIT_HOOKS)
    finally:
        for each in lists:
            each.remove(count)


def copy_module(gm: GraphModule) -> GraphModule:
    """A copy of a module with its own graphs. Parameters and fake values are shared.

    The copy generates its Python code on the first run, not on every edit.
    """
    graph = Graph(tracer_cls=gm.graph._tracer_cls)
    values: dict[Any, Any] = {}
    result: Any = graph.graph_copy(gm.graph, values, return_output_node=True)
    if result is not None:
        value, old_output = result
        graph.output(value).meta = dict(old_output.meta)
    for old, new in values.items():
        # AOTAutograd reads attributes that Dynamo sets on its placeholders (their sources)
        new.__dict__.update({**vars(old), **vars(new)})
    graph._codegen = gm.graph._codegen
    with use_lazy_graph_module(True):
        copy = make_graph_module(gm, graph, gm.__class__.__name__)
    generated = {*copy.__dict__, "_modules", "_code", "_graph"}
    copy.__dict__.update({k: v for k, v in gm.__dict__.items() if k not in generated})
    copy._modules = {k: copy_module(m) if isinstance(m, GraphModule) else m for k, m in gm._modules.items()}
    copy.meta = dict(gm.meta)
    return copy

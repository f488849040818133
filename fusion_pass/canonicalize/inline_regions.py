"""Regions that are compiled once and called from several places (``torch.compiler.nested_compile_region``).

A region that holds head and loss whole is rewritten where it is, once for all its calls. Where the way from a loss
to its projection crosses a region's boundary, the call is replaced by the region's own nodes on its operands, which
is what calling it means; so it is where a region is a handful of nodes, so that its calls can share a sweep. The
copies get fake values of their own: which names share memory is read off those. This file knows no rules.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fusedhead.analysis.interpreter import interpret
from fusedhead.analysis.projections import ANCHORS
from fusedhead.compat import enable_python_dispatcher, enter_autocast, exit_autocast, maybe_get_fake_mode, tree_leaves
from fusedhead.graph.modes import grad_modes
from fusedhead.graph.nodes import callee, fake, name_of, where
from fusedhead.report.report import HeadRecord
from fusedhead.rules.projections import SPELLINGS

HANDFUL = 40  # nodes; a layer of a model has more, and is worth compiling once
KEPT = "head and loss are not in one region that is compiled once and the region cannot be repeated in the call's place"


class NotTheSame(Exception):
    """A region's nodes have other results on a call's operands than the region says."""


def is_call(node: Node) -> bool:
    return node.op == "call_function" and name_of(node) == "invoke_subgraph"


def region_of(call: Node) -> GraphModule:
    """The region that a call runs. Its operands are ``call.args[2:]``, and ``call.args[1:]`` of a checkpoint."""
    holder, owner = call.args[0], call.graph.owning_module
    assert isinstance(holder, Node)
    assert owner is not None
    region = owner.get_submodule(str(holder.target))
    assert isinstance(region, GraphModule)
    return region


def operand_of(call: Node, placeholder: Node) -> Any:
    placeholders = [node for node in placeholder.graph.nodes if node.op == "placeholder"]
    return call.args[(2 if is_call(call) else 1) + placeholders.index(placeholder)]


def returned_by(region: GraphModule) -> list[Any]:
    found = region.graph.output_node().args[0]
    return list(found) if isinstance(found, (list, tuple)) else [found]


@dataclass(frozen=True)
class Frame:
    """The calls that a walk is inside of."""

    call: Node
    outer: Frame | None


def crossed(graph: Graph) -> set[Node]:
    """The calls through whose boundary a loss of the graph, or of a region, reaches a projection."""
    found: set[Node] = set()
    known: dict[tuple[Node, Frame | None], bool] = {}

    def reaches(node: Any, frame: Frame | None) -> bool:
        """Whether a projection is met on the way up from a node, without passing another."""
        if not isinstance(node, Node):
            return False
        if (node, frame) not in known:
            known[node, frame] = False
            known[node, frame] = step(node, frame)
        return known[node, frame]

    def step(node: Node, frame: Frame | None) -> bool:
        if node.op == "placeholder":
            met = frame is not None and reaches(operand_of(frame.call, node), frame.outer)
            if met and frame is not None:
                found.add(frame.call)
            return met
        if node.op.startswith("call_") and name_of(node) in SPELLINGS:
            return True
        source = node.args[0] if node.args else None
        if name_of(node) == "getitem" and isinstance(source, Node) and is_call(source):
            met = reaches(returned_by(region_of(source))[int(node.args[1])], Frame(source, frame))  # type: ignore[arg-type]
            if met:
                found.add(source)
            return met
        met_by = [reaches(each, frame) for each in node.all_input_nodes]  # all of them: each may cross a boundary
        return any(met_by)

    def losses(graph: Graph, frame: Frame | None) -> None:
        for node in graph.nodes:
            if is_call(node):
                losses(region_of(node).graph, Frame(node, frame))
            elif node.op.startswith("call_") and name_of(node) in ANCHORS:
                for source in node.all_input_nodes:
                    reaches(source, frame)

    losses(graph, None)
    return found


def worth_sharing(region: GraphModule) -> bool:
    """Whether a region has a head that its calls may share a sweep of, or whose logits leave it."""
    sites = interpret(region.graph).sites
    return any(site.outputs for site in sites) or (bool(sites) and len(region.graph.nodes) <= HANDFUL)


def inline(gm: GraphModule, recorded: bool, seen: set[GraphModule] | None = None) -> list[HeadRecord]:
    """Replace calls of regions by their nodes where a head needs it, in place, in a graph and in the bodies it runs.

    Bodies come first, and have calls replaced only where a boundary is crossed: they are run from several places
    themselves. ``recorded``: whether gradients are where the graph is run. Returns a record where that fails.
    """
    outermost, seen = seen is None, {gm} if seen is None else seen
    modes, records = grad_modes(gm.graph, recorded), []
    for node in gm.graph.nodes:
        body = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(body, GraphModule) and node.users and body not in seen:
            seen.add(body)
            records += inline(body, modes[next(iter(node.users))], seen)
    return records + inline_calls(gm, recorded, outermost)


def inline_calls(gm: GraphModule, recorded: bool, sharing: bool) -> list[HeadRecord]:
    """The same for the calls of one graph; ``sharing``: those too whose heads may share a sweep."""
    kept: set[Node] = set()
    records: list[HeadRecord] = []
    worth = cache(worth_sharing)  # a region has one answer for all its calls
    while True:
        calls = [node for node in gm.graph.nodes if is_call(node) and node not in kept]
        boundary = crossed(gm.graph) if calls else set()
        chosen = [call for call in calls if call in boundary or (sharing and worth(region_of(call)))]
        if not chosen:
            return records
        for call in chosen:
            if not replaced(gm, call, recorded):
                kept.add(call)
                records += [HeadRecord(False, KEPT, where(call), "", "?", 0, 0, "built", "", 0)] * (call in boundary)


def replaced(gm: GraphModule, call: Node, recorded: bool | None = None) -> bool:
    """Put a region's nodes in the place of a call; False, and nothing done, if that is not the same.

    ``recorded``: whether gradients are where the graph is run; None: as they are now.
    """
    graph, region = gm.graph, region_of(call)
    made: list[Node] = []
    try:
        with graph.inserting_before(call):
            results = copied_into(gm, region, call, made, grad_modes(graph, recorded)[call])
    except Exception:  # a node that does not run on these operands: the call stays
        for node in reversed(made):
            graph.erase_node(node)
        return False
    for user in list(call.users):
        user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
        graph.erase_node(user)
    holder = call.args[0]
    graph.erase_node(call)
    if isinstance(holder, Node) and not holder.users:
        graph.erase_node(holder)
    return True


def copied_into(gm: GraphModule, region: GraphModule, call: Node, made: list[Node], recorded: bool) -> list[Any]:
    """The results of a region's nodes, copied to where the graph is being written; ``made`` takes the copies."""
    env: dict[Node, Any] = {}
    live: dict[Node, Any] = {}  # results that are no fake values: what leaves an autocast region needs what entered it
    entered: dict[Node, Any] = {}
    if any(name_of(user) != "getitem" for user in call.users):
        raise NotTheSame("a call's results are not taken one by one")
    try:
        with torch.set_grad_enabled(recorded):  # and back, whatever the region's own nodes switch
            for node in region.graph.nodes:
                if node.op == "placeholder":
                    env[node] = operand_of(call, node)
                    continue
                if node.op == "output":
                    continue
                env[node] = shared(gm, region, call, node) or gm.graph.node_copy(node, lambda n: env[n])
                made.append(env[node])
                if node.op == "get_attr" or is_call(node):
                    continue
                value = valued(env[node], fake(node), live)
                if fake(node) is None:
                    live[env[node]] = value
                    if node.target is enter_autocast:
                        entered[env[node]] = value
                    elif node.target is exit_autocast:
                        entered.pop(env[node].args[0])
                else:
                    env[node].meta["example_value"] = value
    finally:
        for value in reversed(entered.values()):
            exit_autocast(value)
    return [env[x] if isinstance(x, Node) else x for x in returned_by(region)]


def shared(gm: GraphModule, region: GraphModule, call: Node, node: Node) -> Node | None:
    """A region's use of a module of its own, now the graph's; None for any other node."""
    if node.op != "get_attr":
        return None
    name, part = str(node.target), region.get_submodule(str(node.target))
    if getattr(gm, name, part) is not part:
        name = f"{call.name}_{name}"
    gm.add_module(name, part)
    return gm.graph.get_attr(name)


def valued(node: Node, expected: Any, live: dict[Node, Any]) -> Any:
    """The value of a copied node on its own operands. Raises NotTheSame if it is none that the region had."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: live[n] if n in live else fake(n))
    modes = (maybe_get_fake_mode(fake(n)) for n in node.graph.nodes if isinstance(fake(n), Tensor))
    with next((m for m in modes if m is not None), None) or nullcontext(), enable_python_dispatcher():
        value = callee(node)(*args, **kwargs)
    if expected is not None and not all(map(alike, *map(tree_leaves, (value, expected)))):
        raise NotTheSame(f"{node.name} differs from what the region has")
    return value


def alike(a: Any, b: Any) -> bool:
    """Whether two values differ in nothing but sizes that are symbols: another call may have others."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    known = (isinstance(x, int) and isinstance(y, int) for x, y in zip(a.shape, b.shape))
    sizes = all(x == y for x, y, both in zip(a.shape, b.shape, known) if both)
    return a.dtype == b.dtype and a.device == b.device and a.ndim == b.ndim and sizes

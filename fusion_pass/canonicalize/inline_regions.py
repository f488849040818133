"""Regions that are compiled once and called from several places (``torch.compiler.nested_compile_region``).

A region that holds both head and loss is rewritten in place, once for all its calls. A call is replaced by the region's
nodes on its operands in two cases: the path from a loss to its projection crosses the region's boundary, or the region
is a handful of nodes, whose calls can then share a sweep. The copies get fake values of their own, since those tell
which names share memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fusedhead.analysis.body import Body, Finding
from fusedhead.analysis.interpreter import interpret
from fusedhead.analysis.projections import candidates
from fusedhead.analysis.reasons import Untraced
from fusedhead.compat import enter_autocast, exit_autocast, maybe_get_fake_mode, tree_leaves
from fusedhead.graph.edit import counting_edits
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import callee, fake, name_of, where
from fusedhead.graph.op_names import HEAD_ENDS, PROJECTIONS
from fusedhead.graph.reasons import refuse
from fusedhead.graph.tracing import Traces

HANDFUL = 40  # nodes; a layer of a model has more, and compiling it once pays


class Differs(Exception):
    """The region's nodes have other results on a call's operands than the region itself."""


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
    results = region.graph.output_node().args[0]
    return list(results) if isinstance(results, (list, tuple)) else [results]


@dataclass(frozen=True)
class CallFrame:
    """The stack of calls that a walk is inside of."""

    call: Node
    outer: CallFrame | None


def crossed(graph: Graph) -> set[Node]:
    """The calls whose boundary lies between a projection and a loss of the graph or of a region."""
    crossings: set[Node] = set()
    answers: dict[tuple[Node, CallFrame | None], bool] = {}

    def reaches(node: Any, frame: CallFrame | None) -> bool:
        """Whether a node depends on a projection."""
        if not isinstance(node, Node):
            return False
        if (node, frame) not in answers:
            answers[node, frame] = False
            answers[node, frame] = step(node, frame)
        return answers[node, frame]

    def step(node: Node, frame: CallFrame | None) -> bool:
        if node.op == "placeholder":
            crosses = frame is not None and reaches(operand_of(frame.call, node), frame.outer)
            if crosses and frame is not None:
                crossings.add(frame.call)
            return crosses
        if node.op.startswith("call_") and name_of(node) in PROJECTIONS:
            return True
        source = node.args[0] if node.args else None
        if name_of(node) == "getitem" and isinstance(source, Node) and is_call(source):
            crosses = reaches(returned_by(region_of(source))[int(node.args[1])], CallFrame(source, frame))  # type: ignore[arg-type]
            if crosses:
                crossings.add(source)
            return crosses
        reaching = [reaches(each, frame) for each in node.all_input_nodes]  # all of them: each may cross a boundary
        return any(reaching)

    def losses(graph: Graph, frame: CallFrame | None) -> None:
        for node in graph.nodes:
            if is_call(node):
                losses(region_of(node).graph, CallFrame(node, frame))
            elif node.op.startswith("call_") and name_of(node) in HEAD_ENDS:
                for source in node.all_input_nodes:
                    reaches(source, frame)

    losses(graph, None)
    return crossings


def worth_sharing(region: GraphModule) -> bool:
    """Whether inlining pays: the calls of a region could share one sweep of its head, or it returns logits."""
    facts = GraphFacts(region.graph)
    sites = interpret(facts, Traces(), candidates(facts)).sites
    return any(site.outputs for site in sites) or (bool(sites) and len(region.graph.nodes) <= HANDFUL)


def run(body: Body) -> None:
    """Inline calls of regions where a head needs it, in a graph and in the graphs that it runs."""
    body.findings += inline_regions(body.module, body.records_gradients, body.edited)


def inline_regions(
    gm: GraphModule, grad: bool, count: Callable[[Node], None], visited: set[GraphModule] | None = None
) -> list[Finding]:
    """Inline the calls in a module. ``grad``: whether gradients are recorded where it begins. Returns the calls that
    stay.

    ``count`` is told of edits of inner graphs, which come first. Inner graphs run from several places, so that a call
    in them is inlined only where a head crosses its boundary.
    """
    outermost, visited = visited is None, {gm} if visited is None else visited
    facts, findings = GraphFacts(gm.graph, grad), list[Finding]()
    for node in gm.graph.find_nodes(op="get_attr"):
        inner = getattr(gm, str(node.target), None)
        if isinstance(inner, GraphModule) and node.users and inner not in visited:
            visited.add(inner)
            with counting_edits(inner.graph, count):
                findings += inline_regions(inner, facts.grad_mode(next(iter(node.users))), count, visited)
    return findings + inline_calls(gm, grad, outermost)


def inline_calls(gm: GraphModule, grad: bool, sharing: bool) -> list[Finding]:
    """Inline the calls of one graph. ``sharing``: also the calls whose heads may share a sweep."""
    findings: list[Finding] = []
    not_inlined: set[Node] = set()
    pays = cache(worth_sharing)  # one answer for all calls of a region
    while True:
        calls = [node for node in gm.graph.nodes if is_call(node) and node not in not_inlined]
        boundary = crossed(gm.graph) if calls else set()
        calls = [call for call in calls if call in boundary or (sharing and pays(region_of(call)))]
        if not calls:
            return findings
        for call in calls:
            if not inline_call(gm, call, grad):
                not_inlined.add(call)
                if call in boundary:
                    findings.append(Finding(call, refuse(Untraced.NOT_INLINED, node=call), where(call)))


def inline_call(gm: GraphModule, call: Node, grad: bool) -> bool:
    """Replace a call by the region's nodes. Returns False and changes nothing if the results would differ.

    ``grad``: whether gradients are recorded where the graph begins.
    """
    graph, region = gm.graph, region_of(call)
    copies: list[Node] = []
    try:
        with graph.inserting_before(call):
            results = copy_into(region, call, copies, GraphFacts(graph, grad).grad_mode(call))
    except Exception:  # a node does not run on these operands, so that the call stays
        for node in reversed(copies):
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


def copy_into(region: GraphModule, call: Node, copies: list[Node], recorded: bool) -> list[Any]:
    """Copy a region's nodes to the insertion point and return their results; ``copies`` collects the copies."""
    env: dict[Node, Any] = {}
    live: dict[Node, Any] = {}  # no fake values: leaving an autocast region takes what entering it returned
    entered: dict[Node, Any] = {}
    if any(name_of(user) != "getitem" for user in call.users):
        raise Differs("a call's results are not taken one by one")
    try:
        with torch.set_grad_enabled(recorded):  # restores the mode, whatever the region's nodes switch
            for node in region.graph.nodes:
                if node.op == "placeholder":
                    env[node] = operand_of(call, node)
                    continue
                if node.op == "output":
                    continue
                env[node] = own_module(region, call, node) or call.graph.node_copy(node, lambda n: env[n])
                copies.append(env[node])
                if node.op == "get_attr" or is_call(node):
                    continue
                value = value_on_operands(env[node], fake(node), live)
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


def own_module(region: GraphModule, call: Node, node: Node) -> Node | None:
    """The graph's node for a region's own submodule; None for a node that reads none."""
    if node.op != "get_attr":
        return None
    gm = call.graph.owning_module
    assert gm is not None
    name, part = str(node.target), region.get_submodule(str(node.target))
    if getattr(gm, name, part) is not part:
        name = f"{call.name}_{name}"
    gm.add_module(name, part)
    return gm.graph.get_attr(name)


def value_on_operands(node: Node, expected: Any, live: dict[Node, Any]) -> Any:
    """The value of a copied node on its own operands. Raises Differs if the region's value is another."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: live[n] if n in live else fake(n))
    modes = (maybe_get_fake_mode(fake(n)) for n in node.graph.nodes if isinstance(fake(n), Tensor))
    with next((m for m in modes if m is not None), None) or nullcontext():
        value = callee(node)(*args, **kwargs)
    if expected is not None and not all(map(equal_but_for_sizes, *map(tree_leaves, (value, expected)))):
        raise Differs(f"{node.name} differs from what the region has")
    return value


def equal_but_for_sizes(a: Any, b: Any) -> bool:
    """Whether two values are equal up to symbolic sizes, which differ from call to call."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    sizes_known = (isinstance(x, int) and isinstance(y, int) for x, y in zip(a.shape, b.shape))
    sizes = all(x == y for x, y, both in zip(a.shape, b.shape, sizes_known) if both)
    return a.dtype == b.dtype and a.device == b.device and a.ndim == b.ndim and sizes

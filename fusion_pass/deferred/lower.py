"""Lowers a call on deferred logits: to row statistics, or to nothing where no rule reads it.

The program of the logits and the call are written into a small graph, as Dynamo would have recorded them, and read by
the same interpreter and rules as compiled graphs: what the compiler understands, eager code gets too. A reading is made
on fake tensors with symbolic numbers of tokens, and comes with the guard under which it holds. Nothing here runs on
real tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.interpreter import interpret
from fusedhead.analysis.site import Reading, Site
from fusedhead.analysis.stacked_heads import STACKS, stack_at
from fusedhead.compat import PythonPrinter
from fusedhead.deferred.call_program import CallStep, Made, modes
from fusedhead.deferred.lower_tokenwise import token_by_token
from fusedhead.deferred.reasons import Unanswered
from fusedhead.deferred.results import ALWAYS, DependsOnSizes, Guard, Outcome, Relation, Sharing, Swept, Unread, Whole
from fusedhead.deferred.to_fx import Draft, draft
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import fake, hint, name_of
from fusedhead.graph.op_names import PROJECTIONS
from fusedhead.graph.reasons import refuse
from fusedhead.graph.tracing import Traces
from fusedhead.ir.logits import LOGITS_LIKE, Logits, StackedProjection, logits_of
from fusedhead.ir.lse_differences import DIFFERENCE, SPREAD
from fusedhead.ir.terminal import Kind, Terminal
from fusedhead.kernels.contract import SAVED_STATS, STATS
from fusedhead.legality.legality import illegal
from fusedhead.options import Options
from fusedhead.rewrite.forward_gradients import upgrade
from fusedhead.rewrite.statistics import emit_sweeps
from fusedhead.rewrite.sweeps import sweep_key


def read_call(
    steps: list[CallStep],
    sources: Sequence[Made],
    leaves: Sequence[Tensor],
    exact: frozenset[int] | None,
    chain: Sequence[Made],
    memory: int,
) -> tuple[Guard, Outcome]:
    """The outcome of the last of ``steps``, and the guard on sizes under which it holds.

    ``sources`` are the deferred logits among its arguments; ``chain`` is the first of them, what that was made of,
    and so on. Raises DependsOnSizes where ``exact`` is given and no symbolic sizes can be read.
    """
    mode, device = steps[-1].mode, leaves[0].device.type
    try:
        draft_graph = draft(steps, leaves, exact, mode)
    except Exception as error:  # the call fails on fakes, or needs numbers; real tensors will say which
        if exact is not None:
            raise DependsOnSizes from error
        return ALWAYS, Unread(refuse(Unanswered.FAILED, kind=type(error).__name__, error=error))
    last = draft_graph.results[-1]
    results = last if isinstance(last, list) else [last]
    draft_graph.graph.output(tuple(results)).meta["example_value"] = None
    with modes(mode.read._replace(autocast=None), device):
        traces = Traces()
        stacked = stacks_of(draft_graph.graph, traces)
        parts = {product for logits in stacked.values() for product in logits.head.products}
        reading = interpret(GraphFacts(draft_graph.graph), traces, heads(draft_graph.graph) - parts, stacked)
        outcome = outcome_of(draft_graph, sources, chain, results, reading, memory)
        if isinstance(outcome, Unread):
            outcome = token_by_token(draft_graph, results, reading, memory, many_of(draft_graph)) or outcome
    return guard_of(draft_graph), outcome


def guard_of(draft_graph: Draft) -> Guard:
    """The guards that reading has put on symbolic sizes, as one test."""
    if draft_graph.shape_env is None or not draft_graph.shape_env.guards:
        return ALWAYS
    printer = PythonPrinter()
    tests = list(dict.fromkeys(f"({printer.doprint(guard.expr)})" for guard in draft_graph.shape_env.guards))
    free = {str(symbol) for guard in draft_graph.shape_env.guards for symbol in guard.expr.free_symbols}
    if not free.issubset(draft_graph.symbols):
        raise DependsOnSizes
    return Guard(*draft_graph.function(" and ".join(tests), free))


def stacks_of(graph: Graph, traces: Traces) -> dict[Node, Logits]:
    """The nodes that stack the logits of several heads, which a compiled graph has returned together."""
    stacks = {node: stack_at(node, traces) for node in graph.nodes if name_of(node) in STACKS}
    return {node: logits for node, logits in stacks.items() if logits is not None}


def heads(graph: Graph) -> set[Node]:
    """The projections, except those that compute the weight of another one (a merged adapter)."""
    products = {node for node in graph.nodes if node.op.startswith("call_") and name_of(node) in PROJECTIONS}
    above: set[Node] = set()
    stack = [source for node in products for source in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in above:
            above.add(node)
            stack += node.all_input_nodes
    return products - above


def outcome_of(
    draft_graph: Draft,
    sources: Sequence[Made],
    chain: Sequence[Made],
    results: list[Node],
    reading: Reading,
    memory: int,
) -> Outcome:
    """The answer to a call whose results are terminals of one head, or why statistics do not give it."""
    served = [(site, t) for node in results for site in reading.sites for n, t in site.terminals if n is node]
    sites = {id(site): site for site, _ in served}
    if len(served) != len(results) or len(sites) != 1:
        refusals = [escape for site in reading.sites for escape in site.escapes]
        return Unread(refusals[-1] if refusals else refuse(Unanswered.NO_STATISTIC))
    (site,), terminals = sites.values(), [terminal for _, terminal in served]
    values = [reading.values.get(draft_graph.node(ref)) for ref in chain]
    shared = all(sweep_of(reading.values.get(draft_graph.node(s))) == key(t.logits) for s in sources for t in terminals)
    serves = SharedSweep(shared, tuple(relation(a, b) for a, b in pairwise(values)) if shared else ())
    return answer(draft_graph, site, terminals, memory, serves, stack_of(site, reading))


def stack_of(site: Site, reading: Reading) -> list[Node]:
    """The nodes of the stack that a head was picked from: they go with it."""
    nodes: list[Node] = []
    for whole in reading.sites:
        heads = {part.head for part in whole.head.parts} if isinstance(whole.head, StackedProjection) else set()
        if site.head in heads:
            sites = (each for each in reading.sites if each is whole or each.head in heads)
            nodes += [node for each in sites for node in (*each.head.products, *each.followed)]
    return nodes


def many_of(draft_graph: Draft) -> Callable[[list], Any] | None:
    """The function that builds the container of the last step's results; None for a single result."""
    last = draft_graph.results[-1]
    if not isinstance(last, list):
        return None
    value = fake(origin(last[0]))
    return list if isinstance(value, list) else type(value)


def origin(node: Node) -> Node:
    """The node whose results a part is of."""
    return node if node.target is not operator.getitem else node.all_input_nodes[0]


def key(logits: Logits) -> Hashable:
    """The key of the sweep that serves these logits, with or without gradients."""
    return sweep_key(logits)[:-1]


def is_followed(value: Any) -> bool:
    return isinstance(value, LOGITS_LIKE)


def sweep_of(value: Any) -> Hashable:
    return key(logits_of(value)) if is_followed(value) else None


def relation(value: Any, before: Any) -> Relation | None:
    """The relation of ``value`` to the value that it was made of."""
    if not is_followed(value) or not is_followed(before):
        return None
    dims = logits_of(before).class_dim, logits_of(value).class_dim
    if sweep_of(value) == sweep_of(before):
        return Relation(True, dims)
    return Relation(False, dims) if picks_rows(logits_of(before), logits_of(value)) else None


ROW_SELECTIONS = frozenset({"slice", "select", "narrow", "index_select", "squeeze"})


def picks_rows(old: Logits, new: Logits) -> bool:
    """Whether ``new`` is a selection of rows of ``old``, along dimensions other than the vocabulary."""
    added = new.row_steps[len(old.row_steps) :]
    kept = new.row_steps[: len(old.row_steps)] == old.row_steps
    picked = all(s.op._schema.name.removeprefix("aten::") in ROW_SELECTIONS for s in added)
    return kept and bool(added) and picked and new.steps == old.steps and new.vocab == old.vocab


class SharedSweep(NamedTuple):
    """Whether the sweep of a call serves its logits too, and what each of these is to the one it was made of."""

    shared: bool
    related: tuple[Relation | None, ...]


def answer(
    draft_graph: Draft,
    site: Site,
    terminals: Sequence[Terminal],
    memory: int,
    sweep: SharedSweep,
    stacked: Sequence[Node] = (),
) -> Outcome:
    """Rewrite the graph of a call into the answer. ``stacked``: nodes of the stack that holds the head."""
    graph, many = draft_graph.graph, many_of(draft_graph)
    body = Body(graph, Options(logits="eager", min_logits=0), grad=torch.is_grad_enabled())
    body.facts.keep(min(site.head.products))  # type: ignore[type-var]
    refusal = illegal(site, body)
    if refusal is not None:
        return Unread(refusal)
    site.followed += [node for node in stacked if node not in site.followed]
    rows, all_rows = (hint(z.numel()) or 0 for z in (terminals[0].logits.val, fake(site.head.node)))
    if isinstance(site.head, StackedProjection) and 2 * rows < all_rows:
        return Unread(refuse(Unanswered.OTHERWISE_PICKED))
    calls = [call for emitted in emit_sweeps([site], body.facts, memory) for call in emitted.calls]
    if len(calls) > 1 and isinstance(site.head, StackedProjection):
        if torch.is_grad_enabled():
            upgrade(*calls, facts=body.facts)
        graph.lint()
        return Whole(GraphModule(torch.nn.Module(), graph), many)
    if len(calls) != 1:
        return Unread(refuse(Unanswered.NOT_ONE_SWEEP))
    # A gradient taken in the forward sweep holds a [V, D] buffer until the backward: not for one chunk of many.
    if 2 * rows >= all_rows and torch.is_grad_enabled() and not upgrade(calls[0], facts=body.facts):
        graph.lint()
        return Whole(GraphModule(torch.nn.Module(), graph), many)
    weighted = any(t.weights is not None for t in terminals)
    stats = frozenset(SAVED_STATS) | (frozenset() if weighted else SPREAD)
    likely = SPREAD if any(t.kind is Kind.GATHER and t.want == DIFFERENCE for t in terminals) else frozenset()
    no_gradient = terminals[0].logits.has_no_gradient
    sharing = Sharing(stats if sweep.shared else frozenset(), likely, no_gradient, sweep.related)
    return split_at_call(draft_graph, calls[0], sharing, memory, many)


def split_at_call(
    draft_graph: Draft, call: Node, sharing: Sharing, memory: int, many: Callable[[list], Any] | None
) -> Swept:
    """The graph before and after its one ``head_stats`` call."""
    before = subgraph_of(draft_graph, {}, list(call.args[:6]))
    statistics = {user: STATS[int(user.args[1])] for user in call.users}  # type: ignore[arg-type]
    asks = tuple(name for name in STATS if name in statistics.values())
    after = subgraph_of(draft_graph, statistics, list(draft_graph.graph.output_node().args[0]), asks)  # type: ignore[arg-type]
    return Swept(before, after, asks, str(call.args[6]), memory, many, sharing)


def subgraph_of(
    draft_graph: Draft, stand_ins: dict[Node, str], results: Sequence[Any], asks: Sequence[str] = ()
) -> GraphModule:
    """The part of the graph that computes ``results`` from the leaves and from named extra inputs."""
    graph = Graph()
    env = {leaf: graph.placeholder(leaf.name) for leaf in draft_graph.leaves}
    extra = {name: graph.placeholder(name) for name in asks}
    env.update({node: extra[name] for node, name in stand_ins.items()})
    needed, stack = set(), list(results)
    while stack:
        node = stack.pop()
        if node not in env and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    for node in draft_graph.graph.nodes:
        if node in needed:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[r] for r in results))
    return GraphModule(torch.nn.Module(), graph)

"""Decides which of the stacks that a graph only returns are deferred: those that may be computed after the graph."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from fusedhead.analysis.body import Body, ReturnedStack
from fusedhead.analysis.projections import candidates
from fusedhead.analysis.returned_stacks import program_of_stack, returned_stacks
from fusedhead.analysis.site import Decision, Site
from fusedhead.analysis.source_lines import place
from fusedhead.compat import FakeTensor
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import fake, hint
from fusedhead.graph.recipes import LEAST_TOKENS
from fusedhead.ir.logits import Logits
from fusedhead.legality.checks import functorch
from fusedhead.legality.profitability import gate


def run(body: Body) -> None:
    """Find the stacks to defer, and decide on each of their heads."""
    with_loss: set[Node] | None = None
    for stack in returned_stacks(body):
        if with_loss is None:
            if functorch(body.facts):
                return
            with_loss = candidates(body.facts)
        if not with_loss.isdisjoint(stack.head.products) or not is_movable(stack, body.facts):
            continue
        too_small = gate([Site(stack.head)], body.options.min_logits)(Site(stack.head))
        decisions = [Decision(site_of(part), too_small) for part in stack.head.parts]
        body.returned_heads += decisions
        body.lines |= {site.head: place(site.head.node) for site, *_ in decisions}
        if not too_small:
            body.returned_stacks.append(stack)


def site_of(part: Logits) -> Site:
    """The site of one head of a stack. Its weight may be a slice of a larger one."""
    weight = replace(part.head.weight, val=part.head.weight.val[: part.val.shape[-1]])
    return Site(replace(part.head, weight=weight), outputs=[part.head.node])


def is_movable(stack: ReturnedStack, facts: GraphFacts) -> bool:
    """Whether the stack may be computed after the graph."""
    makers, sources = program_of_stack(stack)
    stack_nodes = {*stack.arranged, *stack.head.products}
    recorded = {facts.grad_mode(node) for node in stack_nodes}
    tokens = [hint(n) or 0 for n in fake(stack.head.node).shape[:-1]]
    tensors = [fake(source) for source in sources if isinstance(fake(source), torch.Tensor)]
    return (
        all(type(tensor) in (FakeTensor, torch.nn.Parameter) for tensor in tensors)
        and facts.write_after(makers[0], stack_nodes) is None
        and recorded in ({True}, {False})
        and (recorded == {True} or torch.Size(tokens).numel() >= LEAST_TOKENS)
        and all(user in stack_nodes or user.op == "output" for node in stack_nodes for user in node.users)
        and facts.write_after(makers[0], sources) is None
    )

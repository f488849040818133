"""Stacked heads whose logits a graph only returns: ``return torch.stack([head(h) for head in heads], dim=1)``.

Models with codebooks leave the loss to their caller. `stacked_heads` finds the nodes that stack heads, in all
spellings.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from fusedhead.analysis.body import Body, ReturnedStack
from fusedhead.analysis.lone_heads import has_sizes_of_a_head
from fusedhead.analysis.stacked_heads import STACKS, stack_at
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.op_names import ARRANGES
from fusedhead.graph.recipes import program_of
from fusedhead.graph.tracing import Traces
from fusedhead.graph.weight_recipes import making
from fusedhead.ir.expr import nodes_of
from fusedhead.ir.logits import StackedProjection


def program_of_stack(stack: ReturnedStack) -> tuple[list[Node], list[Node]]:
    """The nodes that make a stack of its heads' operands, in order, and those operands."""
    weights = making(nodes_of([part.head.weight for part in stack.head.parts]))
    return program_of(stack.outputs, {*stack.arranged, *stack.head.products, *weights})


def returned_stacks(body: Body) -> Iterator[ReturnedStack]:
    """The stacks that the graph only returns, in the order of their outputs."""
    if body.facts.named(STACKS):
        yield from stacks_above_outputs(body.graph, body.traces)


def stacks_above_outputs(graph: Graph, traces: Traces) -> Iterator[ReturnedStack]:
    seen: set[Node] = set()
    ahead = list(graph.output_node().all_input_nodes)
    while ahead:
        node = ahead.pop(0)
        if node in seen or not node.op.startswith("call_"):
            continue
        seen.add(node)
        logits = stack_at(node, traces) if name_of(node) in STACKS else None
        if logits is not None and not logits.row_steps and isinstance(logits.head, StackedProjection):
            stack = only_returned(logits.head, node)
            if stack is not None:
                yield stack
        elif name_of(node) in ARRANGES:
            ahead += node.all_input_nodes


def only_returned(head: StackedProjection, node: Node) -> ReturnedStack | None:
    """A stack with the nodes between it and the outputs; None where something else reads it."""
    if not all(has_sizes_of_a_head(*part.head.weight.val.shape) for part in head.parts):
        return None
    stack, ahead = ReturnedStack(head, [node], []), [node]
    while ahead:
        source = ahead.pop()
        for user in source.users:
            if user.op == "output":
                stack.outputs += [source] if source not in stack.outputs else []
            elif name_of(user) in ARRANGES and len(user.all_input_nodes) == 1:
                stack.arranged.append(user)
                ahead.append(user)
            else:
                return None
    whole = all(fake(output).shape[-1:] == fake(node).shape[-1:] for output in stack.outputs)
    return stack if whole and stack.outputs else None

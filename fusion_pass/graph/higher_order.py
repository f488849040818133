"""Higher-order ops: the graphs that they run, and the operands and memory writes of these graphs.

An op in the table only runs its bodies on its operands. Any other op is assumed to write to all of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from fusedhead.compat import HigherOrderOperator, tree_leaves
from fusedhead.graph.aliases import storages, value_of


class Effects(NamedTuple):
    """The effects of a node: everything that it does besides returning a value."""

    written: tuple[Node, ...] = ()  # the arguments that it writes to
    backward: tuple[Node, ...] = ()  # the arguments that its backward may write to
    anything: bool = False  # whether it may write to any memory
    sure: bool = True  # False where nothing is known and the worst is assumed


Of = Callable[[Node], Effects]  # the effects of a node of any graph
BodyOperands = Callable[[Node], Iterable[Any]]  # the operands of a call's bodies, one for each placeholder


def rest(start: int) -> BodyOperands:
    """All arguments from ``start`` on."""
    return lambda call: call.args[start:]


def lists(*places: int) -> BodyOperands:
    """The entries of some arguments that are lists."""
    return lambda call: [x for place in places if place < len(call.args) for x in tree_leaves(call.args[place])]


def mixed(call: Node) -> Iterable[Any]:
    """No operands, for an op that does not match them to placeholders: a body that writes may write to all."""
    return ()


# keys are torch's names of the ops
OPERANDS: Mapping[str, BodyOperands] = {
    "associative_scan": mixed,
    "autograd_function_apply": rest(2),
    "cond": lists(3),
    "flex_attention": mixed,
    "invoke_subgraph": rest(2),
    "map_impl": lists(1, 2),
    "register_hook": mixed,
    "scan": lists(1, 2, 3),
    "strict_mode": lists(1),
    "tag_activation_checkpoint": rest(1),
    "while_loop": lists(2, 3),
    "while_loop_stack_output": lists(2, 3),
    "wrap": rest(1),
    "wrap_activation_checkpoint": rest(1),
    "wrap_with_autocast": rest(5),
    "wrap_with_set_grad_enabled": rest(2),
}


# how many bodies run in the forward; the others run in the backward
FORWARD_BODIES = {"autograd_function_apply": 1, "register_hook": 0}


def arguments_with_memory(node: Node) -> tuple[Node, ...]:
    """The arguments of a node that give access to memory."""
    return tuple(source for source in dict.fromkeys(node.all_input_nodes) if storages(source))


def runs_bodies(node: Node) -> BodyOperands | None:
    """The operands of a call's bodies; None for an op that is not in the table."""
    name = getattr(node.target, "_name", None)
    operands = OPERANDS.get(str(name))
    return operands if operands and getattr(torch.ops.higher_order, str(name), None) is node.target else None


def bodies_of(call: Node) -> list[GraphModule]:
    """The graphs among a node's arguments."""
    if not isinstance(call.target, HigherOrderOperator):
        return []
    values = (value_of(x) for x in call.all_input_nodes if x.op == "get_attr")
    return [body for body in values if isinstance(body, GraphModule)]


def effects_of_call(call: Node, of: Of) -> Effects:
    """The effects of a higher-order op."""
    operands, bodies = runs_bodies(call), bodies_of(call)
    if operands is None or not bodies:
        return Effects(arguments_with_memory(call), arguments_with_memory(call), sure=False)
    written: dict[Node, None] = {}
    anything = False
    backward: tuple[Node, ...] = ()
    for i, body in enumerate(bodies):
        inside = list(map(of, body.graph.nodes))
        anything |= any(effects.anything for effects in inside)
        places = changed_placeholders(body.graph, inside)
        if i >= FORWARD_BODIES.get(call.target._name, len(bodies)):  # type: ignore[union-attr]
            seeds = gradients_of(bodies[0], body) if i else 1
            backward = arguments_with_memory(call) if places is None or any(place >= seeds for place in places) else ()
            continue
        arguments = list(operands(call))
        count = len(body.graph.find_nodes(op="placeholder"))
        if any(effects.backward for effects in inside):
            backward = arguments_with_memory(call)
        if places is None or (places and count != len(arguments)):
            written.update(dict.fromkeys(arguments_with_memory(call)))
            continue
        for place in places:
            changed = [x for x in tree_leaves(arguments[place]) if isinstance(x, Node) and storages(x)]
            # the written operand has memory; where none has, all arguments count as written
            written.update(dict.fromkeys(changed or arguments_with_memory(call)))
    return Effects(tuple(written), backward, anything)


def changed_placeholders(graph: Graph, effects: Iterable[Effects]) -> set[int] | None:
    """The indices of the placeholders whose memory a body writes to; None where this is not known."""
    memories = list(map(storages, graph.find_nodes(op="placeholder")))
    held = set().union(*map(storages, graph.find_nodes(op="get_attr")))
    changed: set[int] = set()
    for does in effects:
        for target in does.written:
            at = storages(target)
            if not at or at & held:
                return None
            changed.update(i for i, memory_of_one in enumerate(memories) if memory_of_one & at)
        if does.anything:
            return None
    return changed


def gradients_of(forward: GraphModule, backward: GraphModule) -> int:
    """The number of leading placeholders of a backward that are gradients, with memory of their own. 0: not known."""
    results = forward.graph.output_node().args[0]
    if not isinstance(results, (list, tuple)) or len(results) != 2:
        return 0
    outputs, saved = results
    if not isinstance(outputs, (list, tuple)) or not isinstance(saved, (list, tuple)):
        return 0
    count = len(backward.graph.find_nodes(op="placeholder"))
    return len(outputs) if count == len(outputs) + len(saved) else 0

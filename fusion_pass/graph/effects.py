"""Effects of the nodes of a Dynamo graph: the memory that they write to, and whether they draw random numbers.

| a node                                                                     | is asked                              |
|----------------------------------------------------------------------------|---------------------------------------|
| an op of the dispatcher (``OpOverload``)                                   | its schema                            |
| a function, a method, an operator, a packet, a composite op                | `dry_run`: it is run on stand-ins     |
| a higher-order op                                                          | the graphs that it runs               |
| a module, an unknown higher-order op, what a dry run cannot run            | nothing: it writes to all arguments   |
| user code that a dry run cannot run                                        | nothing: it writes to any memory      |

A node counts as pure only where this is shown, never because of its name. Answers are cached for the life of the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import Graph, Node

from fusedhead.compat import DispatchKey, HigherOrderOperator, OpOverload, tree_leaves
from fusedhead.graph.aliases import storages
from fusedhead.graph.dry_run import RANDOM, changed_arguments, dry_run, of_torch
from fusedhead.graph.higher_order import Effects, arguments_with_memory, bodies_of, effects_of_call, runs_bodies
from fusedhead.graph.nodes import inputs

NO_EFFECTS = Effects()
Asked = tuple[Any, Any, Any, Effects]  # a node's target and arguments when it was asked, and the answer
KNOWN: WeakKeyDictionary[Graph, dict[Node, Asked]] = WeakKeyDictionary()


def effects(node: Node) -> Effects:
    """The effects of a node besides its result: the memory that it writes."""
    if not node.op.startswith("call_"):
        return NO_EFFECTS
    answers = KNOWN.get(node.graph)
    if answers is None:
        answers = KNOWN.setdefault(node.graph, {})
    target, args, kwargs, answer = answers.get(node, (None, None, None, NO_EFFECTS))
    if target is not node.target or args is not node.args or kwargs is not node.kwargs:
        answer = ask(node)
        answers[node] = node.target, node.args, node.kwargs, answer
    return answer


def ask(node: Node) -> Effects:
    """Compute `effects` for a node that is not cached."""
    if isinstance(node.target, HigherOrderOperator):
        return effects_of_call(node, effects)
    if isinstance(node.target, OpOverload) and says_all(node.target):
        changed = changed_arguments(node.target, node.args, node.kwargs)
        nodes = dict.fromkeys(x for argument in changed for x in tree_leaves(argument) if isinstance(x, Node))
        return Effects(tuple(nodes))
    if node.target is torch.autograd.grad:  # it cannot be run on stand-ins: it runs other functions' backward
        special = (each for each in ahead_of(node) if isinstance(each.target, HigherOrderOperator) or is_theirs(each))
        return Effects(tuple(dict.fromkeys(x for each in special for x in effects(each).backward)))
    theirs = is_theirs(node)
    if not theirs and not any(map(storages, node.all_input_nodes)):
        return NO_EFFECTS  # not run: it may switch a mode
    seen = None if node.op == "call_module" else dry_run(node)
    if seen is None:
        return Effects(arguments_with_memory(node), arguments_with_memory(node) if theirs else (), theirs, sure=False)
    # a kernel on fake tensors may not touch its outputs, so ``out`` always counts as written
    outputs = {x for x in tree_leaves(node.kwargs.get("out")) if isinstance(x, Node)}
    target = tuple(source for i, source in enumerate(inputs(node)) if i in seen.written or source in outputs)
    return Effects(target, arguments_with_memory(node) if seen.backward else (), seen.elsewhere)


def is_theirs(node: Node) -> bool:
    """Whether a node runs user code: a function of neither PyTorch nor Python."""
    return node.op == "call_module" or (node.op == "call_function" and not of_torch(node.target))


def reaches_far(node: Node) -> bool:
    """Whether a node may write to memory of no argument, as far as is known without a dry run."""
    if is_theirs(node):
        return True
    runs_graphs = isinstance(node.target, HigherOrderOperator)
    return runs_graphs and any(reaches_far(each) for body in bodies_of(node) for each in body.graph.nodes)


def says_all(op: OpOverload) -> bool:
    """Whether an op's schema suffices. It does not for a composite op whose schema marks no write."""
    return op._schema.is_mutable or not op.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)


def nodes_written(node: Node) -> tuple[Node, ...]:
    """The nodes whose memory a node writes to: some of its arguments, or every earlier node where it may write
    anywhere.
    """
    does = effects(node)
    return tuple(earlier(node)) if does.anything else does.written


def writes(node: Node) -> bool:
    """Whether a node writes to anything."""
    does = effects(node)
    return does.anything or bool(does.written)


def ahead_of(node: Node) -> Iterator[Node]:
    """The nodes of a graph before a node."""
    return takewhile(lambda other: other is not node, node.graph.nodes)


def earlier(node: Node) -> Iterator[Node]:
    """The nodes before a node that have memory."""
    return filter(storages, ahead_of(node))


def memory_written(node: Node) -> set[int]:
    """The memory that a node writes to."""
    return set().union(*map(storages, nodes_written(node)))


def memory_written_in_backward(node: Node) -> set[int]:
    """The memory that a node's backward may write to, at any later time."""
    return set().union(*map(storages, effects(node).backward))


def may_write(node: Node, at: Collection[int]) -> bool:
    """Whether a node writes to one of some storages. The node is run only where it could."""
    if not node.op.startswith("call_"):
        return False
    given_it = any(not storages(source).isdisjoint(at) for source in node.all_input_nodes)
    return (given_it or reaches_far(node)) and not memory_written(node).isdisjoint(at)


def draws(node: Node) -> bool:
    """Whether a node draws random numbers, or cannot be run to find out whether it does."""
    if isinstance(node.target, HigherOrderOperator):
        inside = (each for body in bodies_of(node) for each in body.graph.nodes if each.op.startswith("call_"))
        return runs_bodies(node) is None or any(map(draws, inside))
    if node.op == "call_module":
        return True
    if isinstance(node.target, OpOverload) and says_all(node.target):
        return RANDOM in node.target.tags
    seen = dry_run(node)
    return seen is None or seen.draws

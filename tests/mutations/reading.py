"""Calls that write to nothing, from torch's own samples, and what the pass holds them to do."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves, tree_map

from fusedhead.graph.effects import effects
from tests.mutations.calls import copied, small
from tests.op_samples import first_samples


def node_of(op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """A node of a graph of its own, on fakes of tensors."""
    graph, mode = Graph(), FakeTensorMode(shape_env=ShapeEnv())

    def given(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        node = graph.placeholder("x")
        node.meta["example_value"] = mode.from_tensor(x, static_shapes=True)
        return node

    args, kwargs = tree_map(given, (args, kwargs))
    return graph.create_node(op, target, args, kwargs)


def unchanged(function: Callable[..., Any], inputs: Any) -> bool:
    """Whether a call leaves its arguments as they were, values and versions."""
    before = copied(inputs)
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    versions = [x._version for x in tensors]
    args, kwargs = inputs
    function(*args, **kwargs)
    kept = [x for x in tree_leaves(before) if isinstance(x, Tensor)]
    return versions == [x._version for x in tensors] and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(tensors, kept)
    )


def read(infos: Iterable[Any], each: int = 2) -> tuple[Counter[str], list[str]]:
    """Counts of samples by what was found out, and those that are held to write although they do not."""
    counts: Counter[str] = Counter()
    feared = []
    for info in infos:
        dtype = torch.float32 if torch.float32 in info.dtypes else next(iter(info.dtypes), None)
        if dtype is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = first_samples(info, dtype, each)
            for sample in samples:
                inputs = (sample.input, *sample.args), dict(sample.kwargs)
                ways = [("call_function", info.op, info.op)]
                if callable(info.method_variant) and isinstance(sample.input, Tensor):
                    ways.append(("call_method", info.name, info.method_variant))
                for op, target, function in ways:
                    if not small(inputs):
                        continue
                    try:
                        torch.manual_seed(0)
                        with torch.no_grad():
                            quiet = unchanged(function, copied(inputs))
                        node = node_of(op, target, *copied(inputs))
                    except Exception:
                        counts["does not run"] += 1
                        continue
                    does = effects(node)
                    name = f"{info.name} ({op.removeprefix('call_')})"
                    if not quiet:
                        counts["writes"] += 1
                        feared += [] if does.written else [f"{name} writes, unseen"]
                    elif not does.sure:
                        counts["not found out"] += 1
                        feared.append(f"{name} could not be run")
                    else:
                        counts["reads"] += 1
                        feared += [f"{name} is held to write"] if does.written or does.anything else []
    return counts, feared

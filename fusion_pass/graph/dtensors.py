"""DTensors in a Dynamo graph: the mesh of a node's value and its placements.

A `DTensor` is a global tensor of which every rank holds a part. This file reads fake values. It uses public names of
torch.distributed and looks them up in the modules that the program has imported: without them no value is a DTensor.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from fusedhead.graph.nodes import fake, name_of

# in the meta of nodes
KEPT_SHARDS = "fusedhead_kept"  # of a product of DTensors: the reason why it stays, about its shards
PRODUCT = "fusedhead_product"  # of a product: the name of the one of DTensors that it stands for
SWEPT = "fusedhead_swept"  # of a sweep in shards: (process group, product of DTensors, what all ranks must compute)


class Axis(NamedTuple):
    """A mesh dimension that a tensor is sharded over."""

    mesh: Any
    dim: int
    ranks: int
    rank: int
    group: str  # the name of the process group

    @property
    def name(self) -> str | None:
        """The name of the mesh dimension, if the mesh has names."""
        names = self.mesh.mesh_dim_names
        return names[self.dim] if names else None


def public(name: str) -> Any:
    """A name of torch.distributed.tensor. Raises KeyError where no program has imported it."""
    return getattr(sys.modules["torch.distributed.tensor"], name)


def is_dtensor(value: Any) -> bool:
    return "torch.distributed.tensor" in sys.modules and isinstance(value, public("DTensor"))


def axis_of(mesh: Any, dim: int) -> Axis:
    return Axis(mesh, dim, mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim).group_name)


def piece(size: int, axis: Axis) -> tuple[int, int]:
    """This rank's part [first, last) of a sharded dimension: ceil(size / ranks) each, fewer for the last ranks."""
    each = -(-size // axis.ranks)
    return min(axis.rank * each, size), min((axis.rank + 1) * each, size)


def shard_dim(placement: Any, ndim: int) -> int | None:
    """The tensor dimension that a placement cuts into consecutive pieces; None for any other placement."""
    return placement.dim % ndim if type(placement) is public("Shard") else None


def replicated(value: Any, but: int | None = None) -> bool:
    """Whether a DTensor is replicated over every mesh dimension except ``but``."""
    sizes = [value.device_mesh.size(dim) for dim in range(value.device_mesh.ndim)]
    whole = [type(p) is public("Replicate") or size == 1 for p, size in zip(value.placements, sizes)]
    return all(same or dim == but for dim, same in enumerate(whole))


def on_every_rank(mesh: Any) -> tuple[Any, ...]:
    return (public("Replicate")(),) * mesh.ndim


def from_local() -> Callable[..., Any]:
    return public("DTensor").from_local  # type: ignore[no-any-return]


def replicated_local(node: Node) -> Node | None:
    """The local tensor that a replicated DTensor was made of, if `from_local` did not check it against other ranks."""
    call = call_with_mesh(node) if node.target == from_local() or is_closure(node) else None
    if call is None or call.name != "from_local" or call.kwargs.get("run_check") or set(call.kwargs) - {"run_check"}:
        return None
    whole = len(call.args) == 2 and is_dtensor(fake(node)) and replicated(fake(node))
    return node.args[0] if whole and isinstance(node.args[0], Node) else None


class PlacementCall(NamedTuple):
    """The arguments, besides the tensor, of a call of from_local, redistribute, to_local or full_tensor."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


PLACEMENT_CALLS = frozenset({"redistribute", "to_local", "full_tensor"})
# Functions that Dynamo of torch 2.11 and 2.12 makes of such calls: it keeps meshes and placements out of its graphs, in
# the variables that these functions close over.
CLOSURES = {"prim_redistribute": "redistribute", "prim_to_local": "to_local", "prim from_local": "from_local"}


def is_closure(node: Node) -> bool:
    """Whether a node calls a function of `CLOSURES`."""
    return name_of(node) in CLOSURES and str(getattr(node.target, "__module__", "")).startswith("torch._dynamo.")


def placement_call(node: Node) -> PlacementCall | None:
    """The call of a node to one of `PLACEMENT_CALLS`; None for any other, and where its arguments are not known."""
    call = call_with_mesh(node)
    return call if call is not None and call.name in PLACEMENT_CALLS else None


def call_with_mesh(node: Node) -> PlacementCall | None:
    """The call of a node, with what its function closes over (mesh, placements); None where it cannot be read."""
    if not is_closure(node):
        return PlacementCall(name_of(node), node.args[1:], node.kwargs)
    bound = inspect.getclosurevars(node.target).nonlocals  # type: ignore[arg-type]
    args, kwargs = bound.get("args_as_value"), bound.get("kwargs_as_value")
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        return None
    return PlacementCall(CLOSURES[name_of(node)], (*args, *node.args[1:]), {**kwargs, **node.kwargs})


def is_conversion(node: Node) -> bool:
    """Whether a node only turns a DTensor into its local part, by DTensor's own method, or back by `replicating`.

    Neither writes to memory nor draws random numbers. They cannot be tried, because DTensors have no stand-in.
    """
    if getattr(node.target, "__code__", None) in replicating.__code__.co_consts:
        return True
    made_of = node.args[0] if node.args else None
    if not isinstance(made_of, Node) or not is_dtensor(fake(made_of)):
        return False
    if type(fake(made_of)).to_local is not public("DTensor").to_local:
        return False
    called = node.op == "call_method" and node.target == "to_local"
    return called or (is_closure(node) and CLOSURES[name_of(node)] == "to_local")


def can_be_made(node: Node) -> bool:
    """Whether a DTensor like a node's value can be made in its graph: by a mesh in the graph or closed over."""
    graph = node.graph
    return mesh_node(graph, fake(node).device_mesh) is not None or any(map(is_closure, graph.nodes))


def replicating(mesh: Any) -> Callable[[Tensor], Any]:
    """A function that makes a replicated DTensor of a tensor that all ranks have, on a mesh that it closes over."""
    make, placements = from_local(), on_every_rank(mesh)

    def from_local_on_mesh(x: Tensor) -> Any:
        return make(x, mesh, placements, run_check=False)

    return from_local_on_mesh


def layout(value: Any, turned: bool = False) -> str:
    """ "Shard(0)" or "Replicate, Shard(0)": the placements of a DTensor as text. ``turned``: those of its transpose."""

    def word(placement: Any) -> str:
        dim = shard_dim(placement, value.ndim)
        if dim is None:
            return type(placement).__name__.lstrip("_")
        return f"Shard({value.ndim - 1 - dim if turned else dim})"

    return ", ".join(map(word, value.placements))


def mesh_node(graph: Any, mesh: Any) -> Node | None:
    """A node of a graph whose value is a given mesh: an argument of a call, or an input."""
    for node in graph.nodes:
        if node.op == "placeholder" and not isinstance(fake(node), Tensor) and same_mesh(fake(node), mesh):
            return node
    return None


def same_mesh(a: Any, b: Any) -> bool:
    """Whether two meshes are the same. The mesh in a graph may be a wrapper of the tensor's (``real_obj``)."""
    a, b = getattr(a, "real_obj", a), getattr(b, "real_obj", b)
    return a is b or (type(a) is type(b) and bool(a == b))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, bool, torch.SymInt, torch.Size, torch.dtype, torch.device))

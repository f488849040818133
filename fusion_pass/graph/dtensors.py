"""What Dynamo recorded of distributed tensors: on which mesh a node's value lies, and how it is placed there.

A `DTensor` is a global tensor of which every rank holds a part. This file reads fake values; it knows no heads. All
that it uses of torch.distributed is public, and looked up in what a program has imported: without it nothing is one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from fusedhead.graph.nodes import fake

KEPT_SHARDS = (
    "fusedhead_kept"  # in the meta of a product of DTensors: why it stays as it is, a sentence about its shards
)


class Axis(NamedTuple):
    """The dimension of a mesh that a tensor lies in shards on."""

    mesh: Any
    dim: int
    ranks: int
    rank: int
    group: str  # the name of the process group

    def __str__(self) -> str:
        names = self.mesh.mesh_dim_names
        words = f"the {self.ranks} ranks of mesh dimension {names[self.dim]!r}" if names else f"{self.ranks} ranks"
        return words


def public(name: str) -> Any:
    """A name of torch.distributed.tensor. Raises KeyError where no program has imported it."""
    return getattr(sys.modules["torch.distributed.tensor"], name)


def is_dtensor(value: Any) -> bool:
    return "torch.distributed.tensor" in sys.modules and isinstance(value, public("DTensor"))


def axis_of(mesh: Any, dim: int) -> Axis:
    return Axis(mesh, dim, mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim).group_name)


def piece(size: int, axis: Axis) -> tuple[int, int]:
    """What Shard gives to this rank of so many: [first, last), ceil(size / ranks) each, the last ranks fewer."""
    each = -(-size // axis.ranks)
    return min(axis.rank * each, size), min((axis.rank + 1) * each, size)


def shard_dim(placement: Any, ndim: int) -> int | None:
    """The dimension of a tensor that a placement cuts in consecutive pieces, None for any other placement."""
    return placement.dim % ndim if type(placement) is public("Shard") else None


def replicated(value: Any, but: int | None = None) -> bool:
    """Whether every rank has the whole of a DTensor, the mesh dimension ``but`` aside."""
    sizes = [value.device_mesh.size(dim) for dim in range(value.device_mesh.ndim)]
    whole = [type(p) is public("Replicate") or size == 1 for p, size in zip(value.placements, sizes)]
    return all(same or dim == but for dim, same in enumerate(whole))


def on_every_rank(mesh: Any) -> tuple[Any, ...]:
    return (public("Replicate")(),) * mesh.ndim


def from_local() -> Callable[..., Any]:
    return public("DTensor").from_local  # type: ignore[no-any-return]


def layout(value: Any, turned: bool = False) -> str:
    """ "Shard(0)" or "Replicate, Shard(0)": how a DTensor is placed, in words; ``turned``: of its transpose."""

    def word(placement: Any) -> str:
        dim = shard_dim(placement, value.ndim)
        if dim is None:
            return type(placement).__name__.lstrip("_")
        return f"Shard({value.ndim - 1 - dim if turned else dim})"

    return ", ".join(map(word, value.placements))


def mesh_node(graph: Any, mesh: Any) -> Node | None:
    """A node of a graph that holds a mesh: an argument of another call, or an input."""
    for node in graph.nodes:
        if node.op == "placeholder" and not isinstance(fake(node), Tensor) and same_mesh(fake(node), mesh):
            return node
    return None


def same_mesh(a: Any, b: Any) -> bool:
    """Whether two meshes are one; a graph's own may stand for the one that a tensor has (``real_obj``)."""
    a, b = getattr(a, "real_obj", a), getattr(b, "real_obj", b)
    return a is b or (type(a) is type(b) and bool(a == b))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, bool, torch.SymInt, torch.Size, torch.dtype, torch.device))

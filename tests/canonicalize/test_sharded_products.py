"""Heads of distributed tensors that stay as they are, and what is said of them; what they compute: `tests/parallel`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from fusedhead.canonicalize.reasons import InShards
from fusedhead.canonicalize.sharded_products import kept
from fusedhead.graph.reasons import refuse


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("names", "split", "words"),
    [
        (("tp",), True, "is placed as Shard(0) on the 1 ranks of mesh dimension 'tp'"),
        (None, True, "is placed as Shard(0) on 1 ranks"),
        (("tp",), False, "is placed as Replicate on 1 ranks"),
    ],
)
def test_a_head_that_stays_says_how_its_weight_is_placed(
    names: tuple[str, ...] | None, split: bool, words: str
) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=names)
    graph = Graph()
    hidden, weight = (graph.placeholder(name) for name in ("h", "w"))
    hidden.meta["example_value"] = distribute_tensor(torch.randn(3, 4), mesh, [Replicate()])
    weight.meta["example_value"] = distribute_tensor(torch.randn(8, 4), mesh, [Shard(0) if split else Replicate()])
    product = graph.call_function(F.linear, (hidden, weight))
    refusal = kept(product, refuse(InShards.NO_LOSS))
    assert str(refusal).startswith(f"its weight [8, 4] {words}: no loss")
    assert refusal.reason in InShards

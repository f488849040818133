"""Why products of DTensors are not read on plain tensors."""

from __future__ import annotations

from fusedhead.graph.reasons import Reason


class InShards(Reason):
    """A head of a tensor-parallel program stays as it is."""

    KEPT = "its weight {shape} is placed as {placed} on {ranks} ranks: {why}"
    KEPT_ALONG = "its weight {shape} is placed as {placed} on the {ranks} ranks of mesh dimension {name!r}: {why}"
    NOT_ASKED = "fusedhead.shards is off"
    OTHER_RANKS = (
        "not every rank of its process group has compiled the same head to be fused: one has fusedhead.shards off or "
        "other options, or computes something else of it"
    )
    NO_LOSS = "no loss over its classes is taken of it in this graph, and logits in shards are not deferred"
    SPELLING = "a product written as {name} is not read in shards"
    MIXED = "its operands are not all DTensors"
    WEIGHT_DIMENSIONS = "its weight has {ndim} dimensions, a head's weight has 2"
    SYMBOLIC_VOCAB = "the number of its classes is not a compile-time constant"
    ODD_PIECES = "its shards are not the consecutive pieces that Shard(0) gives to the ranks"
    SEVERAL_DIMENSIONS = "its classes lie in shards on several dimensions of the mesh"
    PARTIAL_SUM = "each rank has a part of a sum over the hidden dimensions, and only the sum of them is a logit"
    OTHER_MESH = "hidden states and weight lie on different meshes"
    HIDDEN_STATES = "its hidden states are placed as {placed}, and are not whole on every rank"
    NO_MESH = "the graph does not hold the mesh that {name} is to be a DTensor on"
    RETURNED = "its logits are returned, placed as {placed}"
    GRAD_PLACEMENTS = "{name} of the logits says how their gradients are placed (grad_placements)"
    OWN_PART = "to_local takes each rank's own part of the logits, which are placed as {placed}"
    TAKES_SHARDS = "{name} takes the logits in their shards"
    MEETS = "{name} meets {other}, which is placed as {placed}"
    NO_DTENSOR = "{name} of the logits, in their shards, gives no DTensor"
    LEAVES_A_SUM = "{name} is left as {placed}, a sum that no rank has whole"
    NOT_READ = "what is made of its logits is no loss and no statistic that is read"

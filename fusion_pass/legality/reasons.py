"""Reasons why heads that the analysis can read stay."""

from __future__ import annotations

from fusedhead.graph.reasons import Reason


class Illegal(Reason):
    """The rewritten program might differ from the program."""

    WRITTEN_BEFORE_LOSS = "{name} at {place} changes {tensor} in place before the loss"
    WRITTEN = "{name} at {place} changes {tensor} in place"
    WRITTEN_UNSEEN = (
        "{name} at {place} changes the logits, or what is made of them, through .data: autograd does not see it, and "
        "the program's backward reads the new numbers"
    )
    GRAPH_IN_TRANSFORM = "the graph is inside a torch.func transform ({name})"
    HEAD_IN_TRANSFORM = "the head is inside a torch.func transform"
    SUBCLASS = "{name} is a {kind}, not a plain tensor"
    SEVERAL_DEVICES = "its operands are on different devices ({devices})"
    COUPLED_HEAD = "a head it meets is not fused"
    AUTOGRAD_FUNCTION = (
        "the head is inside {owner}, a torch.autograd.Function with a backward of its own: it is already fused by "
        "hand, and stays as it is written"
    )
    HIGHER_ORDER = "the head is inside {owner}"
    LOSS_OUTSIDE_REGION = "the head is inside {region}, and its loss outside"
    ALIASED_WRITE = "the returned logits are changed in place through another name"
    LEAVES_REGION = "the logits leave the region that is {what}"
    MIXED_GRAD_MODES = "the returned logits are made partly with and partly without gradients recorded"
    WEIGHT_MADE_IN_GRAPH = "its weight is made in the graph ({name} at {place})"
    GATHERED_WEIGHT = (
        "its weight is whole only while its module runs (FullyShardedDataParallel, ZeRO-3), so the returned logits are "
        "computed at once; with the loss in the same compiled module, or under fully_shard (FSDP2), they would not be"
    )
    FLAT_WEIGHT = (
        "its weight is a piece of a flat parameter (FullyShardedDataParallel with use_orig_params=False), and "
        "torch.compile leaves such modules to eager code; with use_orig_params=True a loss in the same compiled module "
        "is fused"
    )
    SHARDS_STACKED = "logits of several heads in one tensor are not read in shards"
    SHARDS_BY_TOKENS = "what is made of its logits is computed token by token of whole rows, which no rank has"
    SHARDS_RETURNED = (
        "its logits are returned, and logits in shards are not deferred: a read by some ranks alone would wait"
    )
    SHARDS_OF_A_PART = "its loss is taken of a part of the classes"
    SHARDS_PICKED_ROWS = "its rows are picked by a tensor, which may pick others on another rank"
    SHARDS_OWN_VECTOR = (
        "{name} meets logits that the program gathered: each rank may have one of its own, and the ranks that hold the "
        "other classes would need it"
    )
    SHARDS_OF_A_VECTOR = "a vector along the classes that wants a gradient does not lie in shards as the weight does"


class Unprofitable(Reason):
    """The rewritten program would be equal and no better."""

    FEW_LOGITS = (
        "its {logits:,.0f} logits are too few for fusing to pay (fewer than fusedhead.min_logits, {least:,}; with 0 it "
        "would be fused)"
    )
    FEW_FOR_A_TOKEN_PROGRAM = (
        "what is made of its logits would be computed token by token, and they are too few for that to pay "
        "({held:,.1f} MiB, fewer than {least:,.0f}; with fusedhead.min_logits=0 it would be fused)"
    )
    GROWS = (
        "its windows would hold {held}, more than its logits, {logits} (with fusedhead.min_logits=0 it would be fused)"
    )
    BUILT_ONCE = "the logits are returned and no gradient is recorded, so building them once is the cheapest"
    AS_ASKED = 'it is returned, and fusedhead.logits="eager" (FUSEDHEAD_LOGITS) asks for logits that are built at once'
    NO_LOSS = (
        "what is made of its logits is no loss and no statistic that is read, and they are not returned as they are"
    )
    MAYBE_A_LAYER = (
        "no loss is taken of it in this graph, and by its sizes it may be an inner layer (a head that is returned has "
        "{vocab:,} classes or more, and {ratio} for each hidden dimension unless {sure:,})"
    )

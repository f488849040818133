"""Records of heads that could not even be read: those inside a torch.func transform, whose tensors are wrapped.

Other projections that are not read (a float64 one, a batched one) are no heads and leave no record. This file
decides nothing.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.fx import Graph

from fusedhead.interpret import Reading, candidates
from fusedhead.read import fake, where
from fusedhead.report import HeadRecord
from fusedhead.safety import functorch


def unread(graph: Graph, reading: Reading) -> list[HeadRecord]:
    """One record a projection with a loss that the reading does not have, where a transform is the reason."""
    missed = candidates(graph) - {site.head.node for site in reading.sites}
    reason = functorch(graph) if missed else None
    if reason is None:
        return []
    records = []
    for node in sorted(missed):
        logits, hidden = fake(node), next((fake(n) for n in node.all_input_nodes), None)
        if isinstance(logits, Tensor) and isinstance(hidden, Tensor) and logits.ndim and hidden.ndim:
            sizes = [str(size) for size in logits.shape[:-1]]
            tokens = math.prod(map(int, sizes)) if all(map(str.isdigit, sizes)) else " x ".join(sizes)
            depth, vocab = (int(s) if str(s).isdigit() else 0 for s in (hidden.shape[-1], logits.shape[-1]))
            records.append(HeadRecord(False, reason, where(node), "", tokens, depth, vocab, "built", "", 0))
    return records

"""Records of products that might be heads and that nothing else in the report speaks of.

A product with a weight from which an output of the graph is reached without passing another product, and which is
large enough for the gate, may be a head: its loss may lie outside the graph. Where it is not deferred the report says
why. What lies between an inner layer of a network and an output (a residual stream, an activation, a normalisation)
tells most layers apart; the rest is told by its sizes and a sentence. This file decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from torch import Tensor
from torch.fx import Graph, Node

from fusedhead.analysis.interpreter import Reading, Site
from fusedhead.analysis.lone_heads import LEAST_RATIO, LEAST_VOCAB, SURE_VOCAB, last_products, looks_like_a_head
from fusedhead.graph.nodes import fake, most, name_of, where
from fusedhead.graph.sizes import same_shape
from fusedhead.legality.missed_heads import unread_head
from fusedhead.legality.profitability import least_logits
from fusedhead.options import Options
from fusedhead.report.report import HeadRecord

# what features of a network go through, and logits do not
FEATURES = frozenset(
    {"layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "relu", "relu_", "gelu", "silu", "elu",
     "leaky_relu", "mish", "hardswish", "dropout", "scaled_dot_product_attention", "embedding", "conv1d", "conv2d",
     "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate"}
)  # fmt: skip
AS_ASKED = 'it is returned, and fusedhead.logits="eager" (FUSEDHEAD_LOGITS) asks for logits that are built at once'
JOINING = frozenset({"add", "add_", "iadd", "sub", "mul", "mul_", "imul", "truediv", "div"})


def products(graph: Graph) -> list[Node]:
    """The products that lead to an output of the graph past no other product, and as logits do."""
    return last_products(graph, lambda node: not of_features(node))


def of_features(node: Node) -> bool:
    """Whether a node makes features of features: a normalisation, an activation, a sum with a residual stream."""
    if name_of(node) in FEATURES:
        return True
    sources = [fake(source) for source in node.all_input_nodes]
    shape = getattr(fake(node), "shape", ())
    wide = [x for x in sources if isinstance(x, Tensor) and len(shape) > 1 and same_shape(x.shape, shape)]
    return name_of(node) in JOINING and len(wide) > 1


def with_a_weight(node: Node) -> bool:
    """Whether a product is one of tokens and a matrix of classes, whose logits are one number a token and class."""
    logits, operands = fake(node), [fake(source) for source in node.all_input_nodes[:2]]
    if not isinstance(logits, Tensor) or len(operands) < 2 or not all(isinstance(x, Tensor) for x in operands):
        return False
    return logits.ndim > 1 and operands[0].ndim > 1 and operands[1].ndim == 2


def large(node: Node, min_logits: str | int) -> bool:
    """Whether the gate lets a product pass; what looks like an inner layer has to pass the automatic one as well."""
    least = least_logits(fake(node).device.type, min_logits)
    if not looks_like_a_head(node):
        least = max(least, least_logits(fake(node).device.type, "auto"))
    return most(fake(node).numel()) >= least


def unlisted(
    graph: Graph,
    reading: Reading,
    listed: Collection[Node],
    why_kept: Callable[[Site], str],
    options: Options,
) -> Iterator[HeadRecord]:
    """One record for each product that ``listed`` does not have. ``why_kept`` says it of a site that was read."""
    sites = {node: site for site in reading.sites for node in (site.head.node, *site.head.products)}
    for node in products(graph):
        if node in listed or not with_a_weight(node) or not large(node, options.min_logits):
            continue
        as_asked = looks_like_a_head(node) and options.logits != "deferred"
        why = AS_ASKED if as_asked else reason(node, sites.get(node), reading, why_kept)
        for record in unread_head(node, why):
            record.likely = not as_asked and (node in sites or node in reading.unread)
            yield record


def reason(node: Node, site: Site | None, reading: Reading, why_kept: Callable[[Site], str]) -> str:
    if site is not None:
        return why_kept(site)
    if node in reading.unread:
        return f"{reading.unread[node]} (at {where(node)})"
    return (
        "no loss is taken of it in this graph, and by its sizes it may be an inner layer (a head that is returned has "
        f"{LEAST_VOCAB:,} classes or more, and {LEAST_RATIO} for each hidden dimension unless {SURE_VOCAB:,})"
    )

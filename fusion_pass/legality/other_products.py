"""Reports products that might be heads and that the report does not list yet.

A product with a weight may be a head whose loss lies outside of the graph if it reaches an output through no other
product and is large enough for the gate. The report says why it is not deferred. A residual stream, an activation or a
normalisation on the way to the output marks an inner layer; the sizes decide on other products, and the report says so.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import Graph, Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.lone_heads import LEAST_RATIO, LEAST_VOCAB, SURE_VOCAB, last_products, looks_like_a_head
from fusedhead.analysis.site import Site
from fusedhead.graph.nodes import fake, most, name_of
from fusedhead.graph.op_names import NEGATES, SCALES
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.graph.sizes import same_shape
from fusedhead.legality.legality import why_not_deferred
from fusedhead.legality.profitability import least_logits
from fusedhead.legality.reasons import Unprofitable

# ops on the features of a network, which are not applied to logits
FEATURES = frozenset(
    {"layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "relu", "relu_", "gelu", "silu", "elu",
     "leaky_relu", "mish", "hardswish", "dropout", "scaled_dot_product_attention", "embedding", "conv1d", "conv2d",
     "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate"}
)  # fmt: skip
COMBINES = SCALES - NEGATES | {"add_", "iadd", "mul_", "imul"}


def output_products(graph: Graph) -> list[Node]:
    """The products that reach an output of the graph through no other product and no op on features."""
    return last_products(graph, lambda node: not of_features(node))


def of_features(node: Node) -> bool:
    """Whether a node is an op on features: a normalisation, an activation, a sum with a residual stream."""
    if name_of(node) in FEATURES:
        return True
    sources = [fake(source) for source in node.all_input_nodes]
    shape = getattr(fake(node), "shape", ())
    operands = [x for x in sources if isinstance(x, Tensor) and len(shape) > 1 and same_shape(x.shape, shape)]
    return name_of(node) in COMBINES and len(operands) > 1


def with_a_weight(node: Node) -> bool:
    """Whether a product multiplies tokens with a matrix of classes: one logit a token and class."""
    logits, operands = fake(node), [fake(source) for source in node.all_input_nodes[:2]]
    if not isinstance(logits, Tensor) or len(operands) < 2 or not all(isinstance(x, Tensor) for x in operands):
        return False
    return logits.ndim > 1 and operands[0].ndim > 1 and operands[1].ndim == 2


def is_large(node: Node, min_logits: str | int) -> bool:
    """Whether a product passes the gate. One with the sizes of an inner layer must pass the automatic gate too."""
    least = least_logits(fake(node).device.type, min_logits)
    if not looks_like_a_head(node):
        least = max(least, least_logits(fake(node).device.type, "auto"))
    return most(fake(node).numel()) >= least


def run(body: Body) -> None:
    """Report each product without a finding or a decision."""
    if not body.reports_products:
        return
    sites = {node: site for site in body.reading.sites for node in (site.head.node, *site.head.products)}
    listed = {finding.node for finding in body.findings}
    for site, *_ in body.decisions:
        listed |= {site.head.node, *site.head.products}
    for node in output_products(body.graph):
        if node in listed or not with_a_weight(node) or not is_large(node, body.options.min_logits):
            continue
        if looks_like_a_head(node) and body.options.logits != "deferred":
            body.note(node, refuse(Unprofitable.AS_ASKED), likely=False)
        else:
            likely = node in sites or node in body.reading.no_rule
            body.note(node, reason(node, sites.get(node), body), likely)


def reason(node: Node, site: Site | None, body: Body) -> Refusal:
    """Why a product is not fused."""
    if site is not None:
        return why_not_deferred(site, body)
    if node in body.reading.no_rule:
        return body.reading.no_rule[node].placed()
    return refuse(Unprofitable.MAYBE_A_LAYER, vocab=LEAST_VOCAB, ratio=LEAST_RATIO, sure=SURE_VOCAB)

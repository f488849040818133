"""Reasons why the analysis cannot read a node, beside those of its rules."""

from __future__ import annotations

from fusedhead.graph.reasons import Reason


class Untraced(Reason):
    WRITES_IN_PLACE = "{name} changes the logits in place ({target})"
    NOT_PYTORCH = "{name} is no op of PyTorch"
    SINGLE_NUMBER = "{name} is taken of a single number that comes from the logits"
    HIGHER_ORDER = "{name} takes the logits, and what it does with them is not read"
    AUTOGRAD_FUNCTION = (
        "an autograd.Function with a backward of its own takes the logits; a loss of logits in shards that is written "
        "so is what fusedhead.linear_cross_entropy(..., group=) computes without them"
    )
    NO_TENSOR = "{name} of the logits is no tensor"
    HOLDS_A_CONSTANT = "{name} holds a constant tensor"
    NOT_TRACED = "{name} cannot be traced alone ({kind}: {error})"
    WRITES_SHARED_MEMORY = "{name} writes to memory that has several names"
    UNKNOWN_EFFECTS = "what {name} does with the logits besides its result is not known"
    WRITES_OTHER_MEMORY = "{name} writes to other memory than the logits'"
    NO_GRADIENT_RECORDED = "{name} changes the logits in place where no gradient is recorded"
    HAS_A_VIEW = "{name} changes logits that {other} is a view of"
    TWO_HEADS = "{computes} mixes two heads"
    NOT_FOLLOWED = "{name} of the logits is not followed"
    RETURNED_WIDE = (
        "{name}, computed from all logits, is returned: it is as wide as they are, and the graph ends before it is "
        "reduced over the classes (where a boolean mask ends the graph, a product with the mask does not)"
    )
    NOT_INLINED = (
        "head and loss are not in one region that is compiled once and the region cannot be repeated in the call's "
        "place"
    )
    NOT_A_PRODUCT = "not a product"


class NotInForward(Reason):
    """Why the gradients of a head are not computed in its forward sweep."""

    NO_GRADIENT = "no gradient is needed"
    CHECKPOINTED = "inside a checkpointed region"
    BOTH_MODES = "its region is run without recording gradients too"
    NO_CLASS = "one of the {ranks} ranks holds none of the {vocab} classes, and has nothing to sweep with the others"
    SHARDS_OF_ROWS = "the gradient of a vector along the tokens is summed over the ranks"
    FLOAT16 = "in float16 a gradient taken before the loss scale is known would underflow"
    OTHER_STATISTICS = "{names} is asked for as well"
    NO_SCALAR = "the per-row results are not reduced to one scalar"
    WRITES_LOSS = "{name} works in place on the loss"
    HIGHER_ORDER = "{name} takes the loss, and what it does with it is not read"
    DEPENDS_ON_RESULTS = "{name} depends on the per-row results themselves"
    OPERAND_CHANGED = "an operand of the loss is changed in place after the head"
    SYMBOLIC_SIZE = "a symbolic size of what is made of the per-row results is not the number of tokens"
    NOT_DIFFERENTIABLE = "what is made of the per-row results cannot be differentiated alone ({kind})"
    NOT_LINEAR = "it is not linear in the per-row results ({name} of them enters the gradient)"
    RANDOM = "{name} draws random numbers, and a gradient would draw others"

"""Why a node cannot be read, before or beside its rules."""

from __future__ import annotations

from fusedhead.ir.reasons import Reason


class Untraced(Reason):
    WRITES_IN_PLACE = "{name} changes the logits in place ({target})"
    NOT_PYTORCH = "{name} is no op of PyTorch"
    SINGLE_NUMBER = "{name} is taken of a single number that comes from the logits"
    HIGHER_ORDER = "{name} takes the logits, and what it does with them is not read"
    NO_TENSOR = "{name} of the logits is no tensor"
    HOLDS_A_CONSTANT = "{name} holds a constant tensor"
    NOT_TRACED = "{name} cannot be traced alone ({kind}: {error})"
    WRITES_SHARED_MEMORY = "{name} writes to memory that has several names"
    UNKNOWN_EFFECTS = "what {name} does with the logits besides its result is not known"
    WRITES_OTHER_MEMORY = "{name} writes to other memory than the logits'"
    NOT_A_PRODUCT = "not a product"

"""Why an op is not computed token by token."""

from __future__ import annotations

from fusedhead.graph.reasons import Reason


class NotByTokens(Reason):
    NO_NEW_TENSOR = "{op} is no op that makes a new tensor"
    UNKNOWN_OP = "{op} is not known to treat tokens apart"
    HOLDS_A_CONSTANT = "{op} holds a constant tensor"
    STACKED = "logits of several heads that are stacked are not computed token by token"
    AUTOCAST = "{op} gives {dtype} under autocast"
    WITH_A_TOTAL = "{op} combines logits with a total over their tokens"
    OTHER_DEVICE = "what comes from the logits is moved to another device"
    SMALL_ALREADY = "{op} of a few numbers a token is left to the graph"
    NO_VECTOR = "{op} takes what is no vector of numbers"
    SEVERAL_INDICES = "what comes from the logits is indexed by several tensors, or by one that comes from them"
    MASKED = "{op} reads tokens that a mask picks, of which only the sum over everything is read"
    SEVERAL_RESULTS = "{op} has several results"
    ONE_OF_SEVERAL = "{op} takes one of several results that do not come from the logits"
    ONE_TOKEN = "one token is picked"
    SOME_TOKENS = "{op} reads only some of the tokens"
    NOT_FIRST = "{op} takes what comes from the logits in another place than its first"
    CLASS_DIM = "the classes of a loss are not the dimension that the logits have them in"
    SYMBOLIC = "{what} has a dimension of symbolic size"
    OVER_TOKENS = "{op} runs over tokens"
    TOKENS_WITH_CLASSES = "tokens and classes are combined with each other"
    WIDE_OPERAND_REPEATED = "an operand as wide as the logits is repeated over tokens"
    LOGITS_REPEATED = "logits are repeated over tokens"
    OTHER_TENSOR = "{op} takes another tensor"
    SOFTMAX_DTYPE = "{op} of {dtype} is an error, which fake values do not see"
    OVER_TOKENS_ALONE = "{op} of the logits over tokens alone"
    SYMBOLIC_TOKENS = "a symbolic number of tokens is computed with"
    SQUEEZE_SYMBOLIC = "squeeze depends on a symbolic size"
    MERGES_TOKENS_AND_CLASSES = "the dimensions of tokens and classes are merged by a view"
    REORDERS_TOKENS = "tokens are put into another order"
    EMPTY_OPERAND = "a vector without entries is joined, which counts for nothing"
    OTHER_TOKENS = "logits of different tokens are joined"

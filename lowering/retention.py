"""How many rows of a product a call keeps for its backward pass, where the number of tokens may be a symbol.

A call below a limit keeps all of them, as Inductor would: the backward pass then multiplies once less. Any other keeps
none, which takes the fewest rows that a shape can have for which no compiler adds a guard.
"""

from __future__ import annotations

from typing import Any

import torch

FEWEST = 2  # sizes of 0 and 1 are looked at, which would tie a graph to them


def keeps(tokens: int, each: int, below: int) -> bool:
    """Whether a call of so many tokens keeps them, ``each`` of a size that ``below`` limits for all."""
    return tokens * each < below


def kept_rows(tokens: Any, each: int, below: int) -> Any:
    """The rows of the tensor that holds them: ``tokens`` where `keeps`, else `FEWEST`, and never fewer."""
    too_many = -(-below // each) if each else 1
    return torch.sym_max(FEWEST, tokens * torch.sym_max(0, 1 - tokens // max(1, too_many)))

"""Retention: the rows of a product that a call keeps for its backward, where the number of tokens may be a symbol.

A call below a limit keeps all rows, as Inductor would, and its backward has one product less. Any other call keeps
none. Its tensor still has `FEWEST` rows, the smallest size for which no compiler adds a guard.
"""

from __future__ import annotations

from typing import Any

import torch

FEWEST = 2  # compilers specialise on sizes of 0 and 1


def keeps(tokens: int, each: int, below: int) -> bool:
    """Whether a call keeps the product of its tokens: their total size, ``each`` a token, is less than ``below``."""
    return tokens * each < below


def kept_rows(tokens: Any, each: int, below: int) -> Any:
    """The rows of the kept tensor: ``tokens`` where `keeps`, else `FEWEST`; never fewer than that."""
    too_many = -(-below // each) if each else 1
    return torch.sym_max(FEWEST, tokens * torch.sym_max(0, 1 - tokens // max(1, too_many)))

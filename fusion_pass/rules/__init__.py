"""One rule per ATen op, by family; importing this package fills the tables of `rules.table`.

`tokenwise` has the second reading of the same families, token by token, for ops that no rule of the first reads.

To add a rule: write it in the family's file with ``@rule(aten.op.overload)``, or ``@token_rule`` in tokenwise/, and its
programs in tests/rules/spellings.py. What it refuses gets a line in the `reasons` beside it.
"""

from fusedhead.rules import elementwise, gather, indexing, losses, pointwise, projections, reductions, views
from fusedhead.rules.table import RULES

__all__ = ["RULES", "elementwise", "gather", "indexing", "losses", "pointwise", "projections", "reductions", "views"]

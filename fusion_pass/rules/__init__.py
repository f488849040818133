"""One rule per ATen op, by family; importing this package fills the table.

`tokenwise` is the second reading: what no rule of the table reads, token by token.

To add a rule: write it in the family's file with ``@rule(aten.op.overload)`` and a property test beside its kin
in tests/rules/.
"""

from fusedhead.rules import elementwise, gather, indexing, losses, pointwise, projections, reductions, views
from fusedhead.rules.table import RULES

__all__ = ["RULES", "elementwise", "gather", "indexing", "losses", "pointwise", "projections", "reductions", "views"]

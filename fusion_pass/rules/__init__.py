"""One rule per ATen op, by family; importing this package fills the table.

`rowwise` stands apart: it reads what no rule of the table does, token by token.

To add a rule: write it in the family's file with ``@rule(aten.op.overload)`` and a property test beside its kin
in tests/rules/.
"""

from fusedhead.rules import columns, entries, losses, picks, pointwise, projections, rows, statistics
from fusedhead.rules.table import RULES

__all__ = ["RULES", "columns", "entries", "losses", "picks", "pointwise", "projections", "rows", "statistics"]

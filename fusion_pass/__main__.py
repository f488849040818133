"""``python -m fusedhead``: the command, for launchers that start modules."""

import sys

from fusedhead.cli import main

sys.exit(main())

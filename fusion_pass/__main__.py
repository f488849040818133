"""``python -m fusedhead``: the command, for launchers that start modules."""

import sys

from fusedhead.run.cli import main

sys.exit(main())

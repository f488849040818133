"""A process of the FSDP2 example, its graphs rewritten and executed as they are: ``torchrun -m`` this, with options."""

from __future__ import annotations

import sys

import fsdp2

from fusedhead import backend
from tests.eager_stack import as_it_is

if __name__ == "__main__":
    backend.Inductor = lambda *_: as_it_is  # type: ignore[assignment, misc]
    fsdp2.main(sys.argv[1:])

"""``python -m tests.compat``: the table of what the package is tested on; ``--write README.md`` puts it there."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusedhead.report.coverage import between_markers
from tests.compat.support import MARKERS, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description="What the package is tested on.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="put the table between the markers of a document")
    arguments = parser.parse_args()
    if arguments.write:
        document = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(between_markers(document, MARKERS, table()), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()

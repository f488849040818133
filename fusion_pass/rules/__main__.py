"""``fusedhead rules``, or ``python -m fusedhead.rules``: what is fused; ``--sentences``; ``--write FILE``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fusedhead.report.coverage import renewed, sentences, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sentences", action="store_true", help="every reason for which a rule leaves a head")
    parser.add_argument("--write", metavar="FILE", type=Path, help="put both between the markers of a document")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusedhead.rules", description="What the pass reads and leaves.")
    add_arguments(parser)
    execute(parser.parse_args(), parser, ())


def execute(arguments: argparse.Namespace, parser: argparse.ArgumentParser, rest: Sequence[str]) -> int:
    if arguments.write:
        document = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(renewed(document), encoding="utf-8")
    else:
        print("\n".join(sentences()) if arguments.sentences else table())
    return 0


if __name__ == "__main__":
    main()

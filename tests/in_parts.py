"""``python -m tests.in_parts``: a long run of programs in several processes, each with its part, on record in a folder.

    python -m tests.in_parts --jobs 26 --minutes 9 --record DIR tests.fuzz.operators_run
    python -m tests.in_parts --jobs 6 --minutes 10 --record DIR tests.deferred.state_machine --seed 100
    python -m tests.in_parts --summary DIR

A process that a program has ended is started again and goes on behind that program. When the time is up, each ends with
the program at hand; the same command goes on where the records end. The module takes ``--part i/n``, ``--record FILE``
and ``--limit SECONDS`` and ends by SIGTERM.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.run_record import lines_of

WAIT = 60.0  # seconds for the program at hand, when the time is up
TAIL = 4000  # characters of a log in the summary
FINE = ("alike", "skipped")


def run(module: list[str], jobs: int, minutes: float, folder: Path, limit: float) -> bool:
    """Whether every part came to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * minutes

    def start(i: int) -> tuple[subprocess.Popen[bytes], int]:
        """The process, and how much the record of its part held before it."""
        record = folder / f"{i}_of_{jobs}.jsonl"
        record.touch()
        command = [sys.executable, "-m", *module, "--part", f"{i}/{jobs}", "--limit", str(limit)]
        command += ["--record", str(record)]
        with record.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), record.stat().st_size

    running = {i: start(i) for i in range(jobs)}
    ended: dict[int, int] = {}
    while running and time.monotonic() < until:
        time.sleep(0.5)
        for i, (process, before) in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[i]
            if code in (0, 1) or (folder / f"{i}_of_{jobs}.jsonl").stat().st_size == before:
                ended[i] = code  # at its end, or before it began
            else:
                running[i] = start(i)
    for process, _ in running.values():
        process.terminate()
    for process, _ in running.values():
        try:
            process.wait(WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
    return not running and all(code in (0, 1) for code in ended.values())


def summary(folder: Path) -> str:
    """Counts, every difference with what is known of it, and the ends of the logs of processes that were ended."""
    lines = lines_of(folder)
    kinds = Counter(of["kind"] for of in lines.values())
    facts: Counter[str] = Counter()
    for of in lines.values():
        facts.update({k: v for k, v in of.items() if isinstance(v, (int, float))})
    rows = [f"{len(lines)} programs: {dict(kinds)}", f"sums: { {k: round(v, 1) for k, v in facts.items()} }"]
    finished = sum("to its end" in log.read_text(errors="replace") for log in folder.glob("*.log"))
    rows.append(f"parts that came to their end: {finished} of {len(list(folder.glob('*.log')))}")
    for name, of in sorted(lines.items()):
        if of["kind"] not in FINE:
            rows.append(f"\n--- {name}: {of['kind']}\n{of.get('detail', '')}")
    for file in [*sorted(folder.glob("*.stacks")), *sorted(folder.glob("*.log"))]:
        text = file.read_text(errors="replace")
        if text.strip() and (file.suffix == ".stacks" or "Traceback" in text or "to its end" not in text):
            rows.append(f"\n=== {file.name}\n{text[-TAIL:]}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.in_parts", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--limit", type=float, default=60, help="seconds that one program may take")
    parser.add_argument("--record", type=Path, help="a folder")
    parser.add_argument("--summary", type=Path, help="a folder whose records are summed up")
    parser.add_argument("module", nargs=argparse.REMAINDER, help="a module of tests, and its options")
    arguments = parser.parse_args()
    if arguments.summary is not None:
        print(summary(arguments.summary))
        return 0
    if arguments.record is None or not arguments.module:
        parser.error("a module and --record DIR are needed")
    whole = run(arguments.module, arguments.jobs, arguments.minutes, arguments.record, arguments.limit)
    print(summary(arguments.record))
    return not whole


if __name__ == "__main__":
    sys.exit(main())

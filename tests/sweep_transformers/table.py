"""The sweep's result as a Markdown table with a summary."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from tests.sweep_transformers.verdict import KINDS, Verdict

WITH_A_HEAD = ("fused", "partly fused", "refused", "differs", "fails")
WRONG = ("differs", "fails")
WITHOUT_A_VERDICT = ("reference fails", "stopped")
DEPTH = ("eager", "aot", "inductor")


def merged(runs: Sequence[Sequence[Verdict]]) -> list[Verdict]:
    """One verdict a class out of several runs: what is wrong under any stack, else that of the deepest that runs."""
    by_class: dict[str, list[Verdict]] = defaultdict(list)
    for run in runs:
        for verdict in run:
            by_class[verdict.name].append(verdict)
    results = []
    for verdicts in by_class.values():
        verdicts.sort(key=lambda v: DEPTH.index(v.stack))
        ran = [v for v in verdicts if v.kind not in WITHOUT_A_VERDICT] or verdicts[:1]
        chosen = next((v for v in verdicts if v.kind in WRONG), ran[-1])
        results.append(replace(chosen, stack=", ".join(dict.fromkeys(v.stack for v in ran))))
    return sorted(results, key=lambda v: v.name)


def cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def summary(verdicts: Sequence[Verdict]) -> list[str]:
    count = Counter(v.kind for v in verdicts)
    heads = sum(count[kind] for kind in WITH_A_HEAD)
    lines = ["| result | classes | |", "|---|---|---|"]
    lines += [f"| {kind} | {count[kind]} | {what} |" for kind, what in KINDS.items() if count[kind]]
    if heads:
        share = 100 * count["fused"] / heads
        lines += ["", f"Fused: {count['fused']} of {heads} classes with a head that compile, {share:.1f} %."]
    cost = {"at most": lambda v: v.pass_ms, "on the largest model": lambda v: v.nodes}
    for which, key in cost.items():
        one = max(verdicts, key=key, default=None)
        if one and one.pass_ms:
            graphs = f"{one.nodes} nodes in {one.graphs} graph{'s' * (one.graphs > 1)}"
            lines.append(f"The pass took {one.pass_ms:.0f} ms {which}: {one.name}, {graphs}.")
    return lines


def markdown(verdicts: Sequence[Verdict], title: str, origin: str) -> str:
    """The summary, then a row a class: first what is not fused."""
    order = {kind: i for i, kind in enumerate(KINDS)}
    rows = sorted(verdicts, key=lambda v: (order[v.kind] == 0, order[v.kind], v.name))
    lines = [f"# {title}", "", origin, "", *summary(verdicts), ""]
    lines += [
        "| class | result | stack | heads fused | nodes | pass, ms | error / allowed | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for v in rows:
        fused = f"{sum(h['fused'] for h in v.heads)} of {len(v.heads)}" if v.heads else ""
        ratio = f"{v.worst_ratio:.2f}" if v.worst else ""
        numbers = (v.nodes or "", f"{v.pass_ms:.0f}" if v.nodes else "", ratio)
        lines.append(
            "| " + " | ".join(map(cell, (v.name, v.kind, v.stack, fused, *numbers, v.detail or v.note))) + " |"
        )
    return "\n".join(lines) + "\n"

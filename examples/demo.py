"""`make demo`: train one GPT twice from the same seed, with inductor and with fusedhead, and compare.

Prints the report of `fusedhead.explain`, then runs `train_gpt.py` twice, each in a process of its own so that
the peak memory is that run's alone. The last line sums it up from the report and the measurements. Exits with
1 where no head was fused or where the loss curves are further apart than rounding explains.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import text
import torch
import train_gpt

import fusedhead

SETTINGS = {
    "cpu": "--model demo --vocab 50304 --batch 4 --length 512 --steps 16 --dtype fp32",
    "cuda": "--model 124M --vocab 50304 --batch 16 --length 1024 --steps 100 --dtype bf16",
}

# Largest relative difference of a step's loss while the two models are still the same model. float32: 16 roundings.
# bfloat16: Inductor rounds each logit by up to 2^-9 of it, fusedhead does not; the mean over tokens leaves less.
ALLOWED = {"fp32": 16 * torch.finfo(torch.float32).eps, "bf16": 2.0**-9}
# Training then multiplies a difference of roundings, whatever made it: two bfloat16 programs go apart by some 0.01 in
# single steps. From there the mean of as many steps is compared.
ALIKE = {"fp32": 100, "bf16": 20}
ALLOWED_OF_MEANS = 2.0**-7

# What the report says of returned logits, and what it comes to here: deferred ones are built when they are first
# used, and train_gpt.py drops them unused.
OUTCOME = {"never built": "never built", "deferred": "never built", "built": "built"}


def explain(settings: list[str]) -> fusedhead.Report:
    """What the backend does to the model of these settings, from one step of it."""
    args = train_gpt.arguments(settings)
    model = train_gpt.build(args)
    tokens = text.load(args.vocab)  # made here the first time, so that neither run's memory has that in it
    batches = text.Batches(tokens, args.batch, args.length, args.seed, torch.device(args.device))
    with torch.autocast(args.device, train_gpt.DTYPES[args.dtype], enabled=args.dtype != "fp32"):
        return fusedhead.explain(model)(*batches.draw())


def measure(backend: str, settings: list[str]) -> dict:
    """One training run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "measurements.json")
        command = [sys.executable, train_gpt.__file__, "--backend", backend, *settings, "--json", str(out)]
        subprocess.run(command, check=True)
        return json.loads(out.read_text())


def difference(pairs: list[tuple[float, float]], dtype: str) -> str:
    """A sentence about losses that are further apart than rounding explains, empty where none are."""
    alike = ALIKE[dtype]
    for step, (a, b) in enumerate(pairs[:alike]):
        if not abs(a - b) <= ALLOWED[dtype] * abs(a):  # so that a NaN fails
            return f"at step {step} the losses are {a} and {b}; rounding explains {ALLOWED[dtype]:.1e} of them"
    for start in range(1, len(pairs) - alike + 1):
        a, b = (sum(losses) / alike for losses in zip(*pairs[start : start + alike]))
        if not abs(a - b) <= ALLOWED_OF_MEANS * abs(a):
            return (
                f"the mean losses of steps {start} to {start + alike - 1} are {a} and {b}; "
                f"bfloat16 explains {ALLOWED_OF_MEANS:.1e} of them"
            )
    return ""


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = [*SETTINGS[device].split(), "--device", device]
    print(f"What fusedhead makes of the model: {' '.join(settings)}", flush=True)
    report = explain(settings)
    print(f"{report}\n\nTraining it with both, one after the other:", flush=True)
    runs = {backend: measure(backend, settings) for backend in ("inductor", "fusedhead")}

    inductor, ours = runs["inductor"], runs["fusedhead"]
    pairs = list(zip(inductor["losses"], ours["losses"], strict=True))
    print(f"\n{'step':>6} {'loss, inductor':>16} {'loss, fusedhead':>16} {'difference':>12}")
    for step in range(0, len(pairs), max(1, len(pairs) // 5)):
        a, b = pairs[step]
        print(f"{step:>6} {a:>16.6f} {b:>16.6f} {b - a:>12.1e}")
    print(f"\n{'':>10} {'ms a step':>10} {'first step s':>13} {'MiB ' + ours['peak_of']}")
    for backend, run in runs.items():
        first, step, peak = run["seconds"][0], run["step_seconds"] * 1e3, run["peak_bytes"] / 2**20
        print(f"{backend:>10} {step:>10.0f} {first:>13.1f} {peak:.0f}")

    fused = [head for head in report.heads if head.fused]
    if not fused:
        print("demo: no head was fused:", *(head.reason for head in report.heads))
        return 1
    if apart := difference(pairs, ours["settings"]["dtype"]):
        print(f"demo: {apart}")
        return 1
    print(
        f"demo: {len(fused)} head{'s' * (len(fused) > 1)} fused, "
        f"logits {', '.join(sorted({OUTCOME[head.logits] for head in fused}))}, "
        f"peak memory {ours['peak_bytes'] / inductor['peak_bytes']:.2f}x of inductor, "
        f"step time {ours['step_seconds'] / inductor['step_seconds']:.2f}x, "
        f"max loss difference {max(abs(a - b) for a, b in pairs):.1e}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

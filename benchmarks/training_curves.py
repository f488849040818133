"""Loss curves of the example GPT with exact gradients and with float8 ones: ``python -m benchmarks.training_curves``.

    python -m benchmarks.training_curves --steps 600 --json curves.json --states states.pt
    python -m benchmarks.training_curves --plot curves.json

Four runs of GPT-2 124M on the machine's own text: exact, float8 from the same seed, exact from a second seed, and eager
PyTorch. What separates float8 from exact is to be read beside what separates two seeds. Float8 is allowed at this
model's hidden size, where a plan would refuse it as too slow. ``--seconds`` takes as many steps as fit instead of
``--steps``. ``--states`` keeps hidden states of held-out text and the head of the first run: the data set ``model``
(`benchmarks.data`). Needs a GPU and ``tokenizers``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu_float8 import any_hidden_size

sys.path.append(str(Path(__file__).parent.parent / "examples"))

LENGTH, HELD_OUT, WARM_UP, RATE = 1024, 400_000, 100, 6e-4
RUNS = {
    "exact": ("fusedhead", {"fusedhead.gradients": "exact"}, 0),
    "float8": ("fusedhead", {"fusedhead.gradients": "float8"}, 0),
    "exact, second seed": ("fusedhead", {"fusedhead.gradients": "exact"}, 1),
    "eager": (None, None, 0),
}
SMOOTHED = 0.98  # of the running mean of a curve that a step keeps
TRIED = 12  # steps that say how many fit
SLOWER = 1.12  # a step on average beside the median


class Lines(logging.Handler):
    """Keeps what is logged: the report says there which products are float8."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train(name: str, tokens: torch.Tensor, given: argparse.Namespace) -> tuple[list[float], Any, dict[str, Any]]:
    """(loss of each step, the model, what the run says of itself)."""
    from gpt import GPT, SIZES
    from text import Batches

    backend, options, seed = RUNS[name]
    torch.manual_seed(seed)
    torch._dynamo.reset()
    device = torch.device("cuda")
    model = GPT(SIZES["124M"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    program = torch.compile(model, backend=backend, options=options) if backend else model
    batches = Batches(tokens[:-HELD_OUT], given.batch, LENGTH, seed, device)
    losses = torch.zeros(given.steps, device=device)
    heads, log = Lines(), logging.getLogger("fusedhead")
    log.addHandler(heads)
    log.setLevel(logging.INFO)
    times = []
    for step in range(given.steps):
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / warm_up(given.steps)) * (1 - 0.9 * step / given.steps)
        x, y = batches.draw()
        with torch.autocast("cuda", torch.bfloat16):
            loss = program(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.detach()
        torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    log.removeHandler(heads)
    if name == "float8" and not any("by float8 products" in line for line in heads.lines):
        raise RuntimeError(f"no product of this run was float8: {heads.lines}")
    told = {"median ms a step": 1e3 * sorted(times)[len(times) // 2], "first step s": times[0], "log": heads.lines}
    return losses.tolist(), model, told


@torch.no_grad()
def keep_states(model: Any, tokens: torch.Tensor, to: Path, count: int = 16384) -> None:
    """Hidden states [count, D], labels [count] and the head's weight [V, D], bfloat16, of held-out text."""
    text = tokens[-HELD_OUT:][: count + 1].long().cuda()
    x, y = text[:-1].view(-1, LENGTH), text[1:]
    states = []
    for rows in x.split(4):
        with torch.autocast("cuda", torch.bfloat16):
            h = model.tokens(rows) + model.positions(torch.arange(LENGTH, device="cuda"))
            for block in model.blocks:
                h = block(h)
            states.append(model.norm(h).bfloat16())
    kept = {"h": torch.cat(states).flatten(0, 1), "y": y, "w": model.head.weight.detach().bfloat16()}
    torch.save({name: value.cpu() for name, value in kept.items()}, to)


def smoothed(losses: list[float]) -> list[float]:
    """A running mean without a bias towards its start."""
    out, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean, weight = SMOOTHED * mean + (1 - SMOOTHED) * loss, SMOOTHED * weight + 1 - SMOOTHED
        out.append(mean / weight)
    return out


def differences(curves: dict[str, list[float]], warm_up: int) -> dict[str, float]:
    """The largest distance of each smoothed curve to the exact one, behind the warm-up."""
    exact = smoothed(curves["exact"])[warm_up:]
    return {
        name: max((abs(a - b) for a, b in zip(smoothed(losses)[warm_up:], exact)), default=0.0)
        for name, losses in curves.items()
        if name != "exact"
    }


def plot(source: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = json.loads(source.read_text())["curves"]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1))
    exact = smoothed(curves["exact"])
    for name, losses in curves.items():
        above.plot(smoothed(losses), label=name, linewidth=1)
        if name != "exact":
            below.plot([a - b for a, b in zip(smoothed(losses), exact)], label=f"{name} - exact", linewidth=1)
    above.set_ylabel("loss, smoothed")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    below.set_ylim(-0.1, 0.1)
    above.legend()
    below.legend()
    figure.tight_layout()
    figure.savefig(source.with_suffix(".png"), dpi=120)


def warm_up(steps: int) -> int:
    return min(WARM_UP, max(1, steps // 4))


def steps_that_fit(tokens: torch.Tensor, given: argparse.Namespace) -> int:
    """Steps of each run, by those of a short float8 run, which compiles, and of a short eager one."""
    began = time.monotonic()
    short = argparse.Namespace(**{**vars(given), "steps": TRIED})
    compiled, plain = (train(name, tokens, short)[2] for name in ("float8", "eager"))
    left = given.seconds - (time.monotonic() - began) - 3 * compiled["first step s"]
    round_of_steps = 1e-3 * SLOWER * (3 * compiled["median ms a step"] + plain["median ms a step"])
    return max(TRIED, int(left / round_of_steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seconds", type=float, help="take as many steps as fit into this time")
    parser.add_argument("--batch", type=int, default=8, help="sequences of 1024 tokens a step")
    parser.add_argument("--runs", type=lambda text: text.split(","), default=list(RUNS))
    parser.add_argument("--json", type=Path, default=Path("curves.json"))
    parser.add_argument("--states", type=Path, help="where hidden states and head of the first run are kept")
    parser.add_argument("--plot", type=Path, help="draw the curves of this file and nothing else")
    given = parser.parse_args()
    if given.plot:
        return plot(given.plot)
    import text

    with any_hidden_size():
        run(text.load(50257), given)
    return None


def run(tokens: torch.Tensor, given: argparse.Namespace) -> None:
    if given.seconds:
        given.steps = steps_that_fit(tokens, given)
    result: dict[str, Any] = {"origin": machine.origin(torch.device("cuda"), "benchmarks.training_curves")}
    result |= {"curves": {}, "runs": {}, "tokens": len(tokens), "batch": given.batch, "steps": given.steps}
    for at, name in enumerate(given.runs):
        losses, model, told = train(name, tokens, given)
        if at == 0 and given.states:
            keep_states(model, tokens, given.states)
        del model
        result["curves"][name], result["runs"][name] = losses, told
        if "exact" in result["curves"]:
            result["differences"] = differences(result["curves"], warm_up(given.steps))
        given.json.write_text(json.dumps(result))
        print(name, f"loss {smoothed(losses)[-1]:.4f}", told, flush=True)
    print(f"{given.steps} steps; largest difference to exact of the smoothed loss:", result.get("differences"))


if __name__ == "__main__":
    main()

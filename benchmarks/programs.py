"""What programs do with the logits besides a cross-entropy, beside Inductor: milliseconds of loss and gradients.

    python -m benchmarks.programs [--shapes 4096x2048x128256,...] [--programs "masked|cap"] [--out DIR]

One row a program: a soft cap, a bias, classes masked with -inf or with the dtype's least number, both together, label
smoothing, functions of each logit; divergences to a frozen teacher (KL both ways, Jensen-Shannon, over the most likely
classes), alone and beside the loss, top-5 accuracy, and the objectives of DPO with entropy and GRPO with KL.
Medians over interleaved rounds, extra MiB, and the time over that of the plain loss of the same backend: what the
rest costs. Writes ``programs.json`` and ``programs.md`` into --out. Runs on the CPU too, with small shapes. It must
not know how a head is computed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.contenders import fresh
from benchmarks.machine import origin
from benchmarks.measure import extra_bytes, interleaved, median_ms, release, settle
from benchmarks.shapes import Case, parse

Program = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# h [N, D], w [V, D], b [V], drop [V] bool, y [N], t [V, D] a frozen teacher's weight
BACKENDS = ("inductor", "fusedhead")


def plain(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), y)


def bias(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w, b).float(), y)


def scale_a_class(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy((F.linear(h, w) * b).float(), y)


def soft_cap(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(30 * torch.tanh(F.linear(h, w).float() / 30), y)


def masked(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float().masked_fill(drop, -torch.inf), y)


def masked_by_least(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    z = F.linear(h, w).float()
    return F.cross_entropy(z.masked_fill(drop, torch.finfo(z.dtype).min), y)


def masked_after_soft_cap(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy((30 * torch.tanh(F.linear(h, w).float() / 30)).masked_fill(drop, -torch.inf), y)


def smoothing(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), y, label_smoothing=0.1)


def gelu(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.gelu(F.linear(h, w).float()), y)


def clamped(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float().clamp(-30, 30), y)


def distilled(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = F.softmax(F.linear(h, t).float() / 2, -1)
    return 4 * F.kl_div(F.log_softmax(F.linear(h, w).float() / 2, -1), teacher, reduction="batchmean")


def distilled_beside_the_loss(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    z = F.linear(h, w).float()
    with torch.no_grad():
        teacher = F.softmax(F.linear(h, t).float() / 2, -1)
    return F.cross_entropy(z, y) + 4 * F.kl_div(F.log_softmax(z / 2, -1), teacher, reduction="batchmean")


def reverse_kl(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Of on-policy distillation: the student's distribution against the teacher's."""
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(h, t).float(), -1)
    student = F.log_softmax(F.linear(h, w).float(), -1)
    return F.kl_div(teacher, student, reduction="batchmean", log_target=True)


def jsd(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """The generalised Jensen-Shannon divergence of TRL's GKDTrainer, beta 0.5, temperature 0.9."""
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(h, t).float() / 0.9, -1)
    student = F.log_softmax(F.linear(h, w).float() / 0.9, -1)
    beta = torch.tensor(0.5, dtype=student.dtype, device=student.device)
    mixture = torch.logsumexp(torch.stack([student + torch.log1p(-beta), teacher + torch.log(beta)]), dim=0)
    of_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    of_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    return (beta * of_teacher + (1 - beta) * of_student).sum() / len(h)


def top64_distilled(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """KL to the teacher's 64 most likely classes, renormalised, beside the loss."""
    z = F.linear(h, w).float()
    with torch.no_grad():
        values, indices = F.linear(h, t).float().topk(64, -1)
        teacher = F.softmax(values, -1)
    student = F.log_softmax(z, -1).gather(-1, indices)
    return F.cross_entropy(z, y) + F.kl_div(student, teacher, reduction="batchmean")


SEQUENCES = 8  # that the tokens are, of one length


def dpo_with_entropy(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """DPO, half of the sequences chosen and half rejected, t the reference's head, with an entropy bonus."""
    logp = F.log_softmax(F.linear(h, w).float(), -1)
    with torch.no_grad():
        of_reference = F.log_softmax(F.linear(h, t).float(), -1).gather(-1, y[:, None]).view(SEQUENCES, -1).sum(-1)
    chosen, rejected = (logp.gather(-1, y[:, None]).view(SEQUENCES, -1).sum(-1) - of_reference).chunk(2)
    entropy = -(logp.exp() * logp).sum(-1).mean()
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean() - 0.01 * entropy


def grpo_with_kl(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """GRPO's clipped objective with the k3 estimate of the KL to a reference, t its head."""
    logp = F.log_softmax(F.linear(h, w).float(), -1).gather(-1, y[:, None]).view(SEQUENCES, -1)
    with torch.no_grad():
        reference = F.log_softmax(F.linear(h, t).float(), -1).gather(-1, y[:, None]).view(SEQUENCES, -1)
    advantage = torch.linspace(-1, 1, SEQUENCES, device=h.device)[:, None]
    ratio = (logp - logp.detach()).exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    away = reference - logp
    return -(clipped - 0.04 * (away.exp() - away - 1)).mean()


def top5_beside_the_loss(h: Tensor, w: Tensor, b: Tensor, drop: Tensor, y: Tensor, t: Tensor) -> Tensor:
    z = F.linear(h, w)
    hits = (z.detach().topk(5, -1).indices == y[:, None]).any(-1)
    return F.cross_entropy(z.float(), y) + 0 * hits.float().mean()


PROGRAMS: tuple[Program, ...] = (
    plain, bias, scale_a_class, soft_cap, masked, masked_by_least, masked_after_soft_cap, smoothing, gelu, clamped,
    distilled, distilled_beside_the_loss, top5_beside_the_loss,
    reverse_kl, jsd, top64_distilled, dpo_with_entropy, grpo_with_kl,
)  # fmt: skip


def step_of(program: Program, backend: str, case: Case, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Loss, dH and dW; the last 256 classes are dropped and no label lies there."""
    generator = torch.Generator(device).manual_seed(0)
    n, d, v, dtype = case.tokens, case.hidden, case.vocab, case.torch_dtype
    h = torch.randn(n, d, generator=generator, device=device).to(dtype).requires_grad_()
    w = (2 * torch.randn(v, d, generator=generator, device=device) / d**0.5).to(dtype).requires_grad_()
    b = torch.rand(v, generator=generator, device=device).to(dtype) + 0.5
    y = torch.randint(0, v - 256, (n,), generator=generator, device=device)
    t = (2 * torch.randn(v, d, generator=generator, device=device) / d**0.5).to(dtype)
    drop = torch.arange(v, device=device) >= v - 256
    compiled = torch.compile(fresh(program), backend=backend, dynamic=False)

    def step() -> tuple[Tensor, ...]:
        loss = compiled(h, w, b, drop, y, t)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shapes", default="4096x2048x128256,16384x2048x128256" if on_gpu else "256x64x4096:float32")
    parser.add_argument("--programs", default="", help="a regular expression that their names contain")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    device = torch.device("cuda:0" if on_gpu else "cpu")
    chosen = [program for program in PROGRAMS if re.search(options.programs, program.__name__)]
    rows: list[dict[str, Any]] = []
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        tqdm.write(line)

    for case in parse(options.shapes):
        settle(device, case.torch_dtype)
        plainly: dict[str, float] = {}
        say(f"\n{case.text}\n\n| program | Inductor ms, over plain | fusedhead ms, over plain | ratio | MiB, MiB |")
        say("|---|---|---|---|---|")
        for program in tqdm(chosen, desc=case.text, unit="program", leave=False):
            steps = {name: step_of(program, name, case, device) for name in BACKENDS}
            mib = {name: extra_bytes(step, device) / 2**20 for name, step in steps.items() if step()}
            ms = {name: median_ms(t) or 0.0 for name, t in interleaved(steps, device, options.rounds, 3.0).items()}
            plainly = plainly or ms
            row = {"shape": case.text, "program": program.__name__, "ms": ms, "extra_mib": mib}
            rows.append(row | {"over_plain": {name: ms[name] / plainly[name] for name in BACKENDS}})
            cells = [f"{ms[name]:.2f}, {ms[name] / plainly[name]:.2f}" for name in BACKENDS]
            cells += [f"{ms['fusedhead'] / ms['inductor']:.2f}", ", ".join(f"{mib[name]:.0f}" for name in BACKENDS)]
            say(f"| {program.__name__} | " + " | ".join(cells) + " |")
            del steps
            torch.compiler.reset()
            release(device)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"origin": origin(device, "benchmarks.programs"), "rows": rows}
    (options.out / "programs.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "programs.md").write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()

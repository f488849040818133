"""What the pass adds to a compilation: ``python -m benchmarks.compile_time``, a 12-layer GPT, Inductor
beside it.

The pass is the time from the backend's entry to Inductor's, and Inductor is stopped right there, so nothing
else is measured; how many functions are called in it does not depend on what else the machine does.
Recompilations are counted over growing batches, with the same stop. ``--full`` also times one whole training
step from an empty cache, both ways. ``--processes`` times whole first steps alone, each in a process of its own: with
empty caches (cold), and once more with those that the first has left (warm).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from tqdm import tqdm

from benchmarks import machine
from fusedhead.kernels.torch_engine.cpp_library import vector_bits

BACKENDS = ("inductor", "fusedhead")
os.environ.setdefault("FUSEDHEAD_MIN_LOGITS", "0")  # models as small as one likes


class Block(nn.Module):
    """One pre-norm transformer block, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    """A GPT that returns its loss, with the tied head that is to be found."""

    def __init__(self, layers: int, width: int, vocab: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@contextmanager
def stopped_inductor(reached: Callable[[], None]) -> Iterator[None]:
    """Within, Inductor only says that it was reached and runs the graph as it is."""
    from torch._inductor import compile_fx as inductor

    compile_graph = inductor.compile_fx

    def stop(graph: torch.fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        reached()
        return graph.forward

    inductor.compile_fx = stop  # type: ignore[assignment]
    try:
        yield
    finally:
        inductor.compile_fx = compile_graph


def pass_milliseconds(model: nn.Module, tokens: Tensor, backend: str) -> tuple[float, float]:
    """One compilation: (Dynamo's ms until the backend is called, the backend's ms until Inductor is)."""
    marks: list[float] = []
    mark = lambda: marks.append(time.perf_counter())  # noqa: E731
    compile_graph = lookup_backend(backend)

    def entered(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        mark()
        return compile_graph(graph, inputs)

    torch.compiler.reset()
    if backend == "inductor":
        compile_graph = torch._TorchCompileInductorWrapper("default", None, None)
    with stopped_inductor(mark):
        mark()
        torch.compile(model, backend=entered)(tokens)
    began, backend_at, inductor_at = marks
    return (backend_at - began) * 1e3, (inductor_at - backend_at) * 1e3


def pass_calls(model: nn.Module, tokens: Tensor) -> int:
    """The functions, of Python and C, that one compilation calls in the pass: no other load of a machine changes it."""
    count = [0]
    compile_graph = lookup_backend("fusedhead")

    def counted(frame: Any, event: str, argument: Any) -> None:
        count[0] += event in ("call", "c_call")

    def entered(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        sys.setprofile(counted)
        return compile_graph(graph, inputs)

    torch.compiler.reset()
    with stopped_inductor(lambda: sys.setprofile(None)):
        try:
            torch.compile(model, backend=entered)(tokens)
        finally:
            sys.setprofile(None)
    return count[0]


def compilations(model: nn.Module, batches: list[Tensor], backend: str) -> int:
    """How often Inductor is reached while the batch grows."""
    count = [0]

    def reached() -> None:
        count[0] += 1

    torch.compiler.reset()
    with stopped_inductor(reached):
        program = torch.compile(model, backend=backend)
        for tokens in batches:
            program(tokens).backward()
    return count[0]


def first_step_seconds(model: nn.Module, tokens: Tensor, backend: str) -> float:
    """One training step with everything compiled from nothing."""
    torch.compiler.reset()
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        began = time.perf_counter()
        torch.compile(model, backend=backend)(tokens).backward()
        seconds = time.perf_counter() - began
    if before is None:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
    return seconds


def first_step_of_a_process(words: list[str], backend: str) -> dict[str, dict[str, float]]:
    """Seconds of a process's first step, cold and warm: until it has its gradients, and of all that the process did."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        for state in ("cold", "warm"):
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.compile_time", *words, "--only", backend],
                env=os.environ | caches, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"{backend}, {state}: {done.stderr[-600:]}")
            step = float(done.stdout.split()[-1])
            found[state] = {"step": step, "process": time.perf_counter() - began}
    return found


def only_step(model: Model, tokens: Tensor, backend: str) -> float:
    """Seconds of this process's first step."""
    model.embed.weight.sum().item()  # the device is ready
    began = time.perf_counter()
    torch.compile(model, backend=backend)(tokens).backward()
    assert model.embed.weight.grad is not None
    model.embed.weight.grad.sum().item()
    return time.perf_counter() - began


def processes(arguments: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Print and keep `first_step_of_a_process` of both backends."""
    result: dict[str, Any] = machine.origin(torch.device(arguments.device), "benchmarks.compile_time", words)
    given = [word for word in words if word != "--processes"]
    print(f"{'backend':12}{'cold step s':>12}{'process':>9}{'warm step':>11}{'process':>9}")
    for backend in BACKENDS:
        result[backend] = seconds = first_step_of_a_process(given, backend)
        cold, warm = seconds["cold"], seconds["warm"]
        print(f"{backend:12}{cold['step']:12.1f}{cold['process']:9.1f}{warm['step']:11.1f}{warm['process']:9.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--repeat", type=int, default=5, help="compilations after the first")
    parser.add_argument("--full", action="store_true", help="also whole first steps, from an empty cache")
    parser.add_argument("--processes", action="store_true", help="only whole first steps, of processes of their own")
    parser.add_argument("--only", choices=BACKENDS, help="print the seconds of this process's first step, and end")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words)
    if arguments.processes:
        return processes(arguments, words)
    vector_bits()  # a second of a process that uses Inductor on a CPU, with and without the pass
    torch.manual_seed(0)
    model = Model(arguments.layers, arguments.width, arguments.vocab).to(arguments.device)
    batches = [torch.randint(arguments.vocab, (b, 65), device=arguments.device) for b in (2, 3, 4, 6)]
    if arguments.only:
        print(only_step(model, batches[0], arguments.only))
        return {}
    result: dict[str, Any] = machine.origin(torch.device(arguments.device), "benchmarks.compile_time", words)
    titles = f"{'backend':12}{'dynamo ms':>12}{'pass ms':>10}{'first':>8}{'graphs':>8}{'calls':>9}"
    print(titles + "  full s" * arguments.full)
    for backend in BACKENDS:
        runs = [
            pass_milliseconds(model, batches[0], backend)
            for _ in tqdm(range(arguments.repeat + 1), desc=backend, leave=False)
        ]
        numbers: dict[str, Any] = {
            "dynamo_ms": statistics.median(before for before, _ in runs[1:]),
            "pass_ms": statistics.median(milliseconds for _, milliseconds in runs[1:]),
            "first_pass_ms": runs[0][1],
            "graphs": compilations(model, batches, backend),
        }
        if backend == "fusedhead":
            numbers["calls"] = pass_calls(model, batches[0])
        if arguments.full:
            numbers["full_seconds"] = first_step_seconds(model, batches[0], backend)
        result[backend] = numbers
        print(
            f"{backend:12}{numbers['dynamo_ms']:12.1f}{numbers['pass_ms']:10.1f}"
            f"{numbers['first_pass_ms']:8.1f}{numbers['graphs']:8}{numbers.get('calls', ''):9}"
            + (f"{numbers['full_seconds']:8.1f}" if arguments.full else "")
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()

"""Compiles every kernel that the engine would launch on a GPU, on a machine that has none.

Triton compiles for a chip by its name alone, ptxas included. What has to be there is the launch: which arguments are
aligned or equal to one, which tile and which constants a kernel is asked for. So the engine itself runs, on tensors
without storage (device "meta"), through `launch.launch` and Triton's own look at the arguments, and every launch ends
where the compiled kernel would be handed to the driver. Nothing is computed. The first IR that Triton makes of a kernel
decides all that follows, with the options and the assembler: a kernel whose IR is on record is not compiled again.
Triton has to be imported without TRITON_INTERPRET.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as _compile
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fusedhead.kernels.triton_engine.launch import sweep, tiles


class Chip(NamedTuple):
    """What the engine asks a device for, and what a program of it can have."""

    name: str
    architecture: str  # as its vendor's compiler names it
    multiprocessors: int
    shared: int  # KiB of shared memory that one program can have, by the vendor's table of architectures

    @property
    def target(self) -> GPUTarget:
        if self.architecture.startswith("sm_"):
            return GPUTarget("cuda", int(self.architecture[3:]), 32)
        return GPUTarget("hip", self.architecture, 64)

    @property
    def major(self) -> int:
        return self.target.arch // 10 if self.target.backend == "cuda" else tiles.AMD

    def answer(self, device: torch.device) -> tuple[int, int]:
        """In place of `tiles.device_of`."""
        return self.major, self.multiprocessors

    def serves_pairs(self, device: torch.device) -> bool:
        """In place of `tiles.pairs_serve`."""
        return self.major in tiles.PAIRED_CHIPS


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", "sm_80", 108, 163),
        Chip("A10", "sm_86", 72, 99),
        Chip("L40S", "sm_89", 142, 99),
        Chip("H100", "sm_90", 132, 227),
        Chip("B200", "sm_100", 148, 227),
        Chip("RTX 5090", "sm_120", 170, 99),
        Chip("MI300X", "gfx942", 304, 64),
    )
}
H100 = CHIPS["H100"]


class Compiled(NamedTuple):
    """One kernel as one launch wants it, and what it takes of the chip."""

    kernel: str
    constants: dict[str, Any]  # its constexpr parameters by name
    registers: int  # a thread
    spilled: int  # bytes a thread: its stack, which holds what found no register
    shared: int  # bytes a program, tiles in flight included
    digest: str  # of its PTX, AMD's of its assembly, without line numbers: it differs only where the code does
    ir: str  # the digest of its first IR, of the options it is compiled with and of the version of ptxas
    ptx: str = ""  # or assembly; empty where the kernel is on record


class OnRecord(Exception):
    """Ends a compilation, and then stands where Triton keeps the compiled kernel."""

    def __init__(self, kernel: Compiled) -> None:
        self.kernel = kernel


def digest(text: str) -> str:
    """Of PTX or of IR, without its comments and locations."""
    text = re.sub(r"^#loc.*\n| loc\([^()]*\)", "", text, flags=re.MULTILINE)
    return hashlib.sha256(re.sub(r"//.*", "", text).encode()).hexdigest()[:12]


class _Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, chip: Chip) -> None:
        self.target = chip.target
        self.device = list(CHIPS).index(chip.name)  # Triton keeps what it compiled by device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def _usage(asm: dict[str, Any]) -> dict[str, int]:
    """What the binary says that it takes: read with the cuobjdump that Triton brings, for AMD's in its text."""
    if "amdgcn" in asm:
        words = {"REG": "vgpr_count", "STACK": "private_segment_fixed_size"}
        matches = {name: re.search(rf"\.{word}:\s+(\d+)", asm["amdgcn"]) for name, word in words.items()}
        return {name: int(number[1]) if number else 0 for name, number in matches.items()}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        words = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return {word: int(number) for word, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def _asking(question: str) -> list[ModuleType]:
    """The modules of the engine that ask this of a tensor's device."""
    return [x for name, x in sys.modules.items() if name.startswith("fusedhead.kernels.") and hasattr(x, question)]


def _look_at_ir(record: Mapping[str, Compiled]) -> Callable[..., tuple[str, str] | None]:
    """Triton's hook into the stages of a compilation; it asks it for a part of the key of its cache too."""

    def hook(*arguments: Any) -> tuple[str, str] | None:
        if not arguments:
            return "ir", "ir"
        compiler, stages, options, *_ = arguments
        first = next(iter(stages))
        lower = stages[first]

        def look(module: Any, metadata: dict[str, Any]) -> Any:
            metadata["ir"] = digest(f"{module}{options.hash()}{compiler.hash()}")
            if metadata["ir"] in record:
                raise OnRecord(record[metadata["ir"]])
            return lower(module, metadata)

        stages[first] = look
        return None

    return hook


def _compile_unless_on_record(*arguments: Any, **options: Any) -> Any:
    try:
        return _compile(*arguments, **options)
    except OnRecord as found:
        return found


@contextmanager
def absent_gpu(chip: Chip = H100, known: Mapping[str, Compiled] | None = None) -> Iterator[list[Compiled]]:
    """Inside, a launch on tensors of device "meta" compiles its kernel and adds it to the list, once.

    ``known``: what is on record, by the digest of the first IR. A kernel that does not compile raises what Triton
    raises. Modules of the engine have to be imported before.
    """
    seen: set[int] = set()
    listed: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        done = run(kernel, *args, grid=grid, warmup=True, **options)
        done = done.result() if hasattr(done, "result") else done
        if id(done) in seen:
            return
        seen.add(id(done))
        constants = {p.name: x for p, x in zip(kernel.params, args) if p.is_constexpr}
        if isinstance(done, OnRecord):
            listed.append(done.kernel._replace(constants=constants))
            return
        usage = _usage(done.asm)
        shared = done.metadata.shared + usage.get("SHARED", 0)
        spilled = usage["STACK"] + usage.get("LOCAL", 0)
        text = done.asm.get("ptx") or done.asm["amdgcn"]
        taken = (usage["REG"], spilled, shared, digest(text))
        listed.append(Compiled(kernel.fn.__name__, constants, *taken, done.metadata.ir, text))

    with ExitStack() as stack:
        for owner, name, stand_in in (
            (JITFunction, "run", compile_only),
            (driver, "_active", _Driver(chip)),
            (triton.compiler, "compile", _compile_unless_on_record),
            (triton.knobs.runtime, "add_stages_inspection_hook", _look_at_ir(known or {})),
            (triton.knobs.compilation, "disable_line_info", True),
            *((x, "device_of", chip.answer) for x in _asking("device_of")),
            *((x, "pairs_serve", chip.serves_pairs) for x in _asking("pairs_serve")),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        sweep.forget()  # tiles of another chip
        yield listed

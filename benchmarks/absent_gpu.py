"""Compiles every kernel that the engine would launch on a GPU, on a machine that has none.

Triton compiles for a chip by its name alone, ptxas included. What has to be there is the launch: which arguments are
aligned or equal to one, which tile and which constants a kernel is asked for. So the engine itself runs, on tensors
without storage (device "meta"), through `triton_launch` and Triton's own look at the arguments, and every launch ends
where the compiled kernel would be handed to the driver. Nothing is computed. Triton has to be imported without
TRITON_INTERPRET. This file must not know which heads are compiled, nor what for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Chip(NamedTuple):
    """What the engine asks a device for."""

    name: str
    capability: int  # 10 · major + minor
    multiprocessors: int

    def answer(self, device: torch.device) -> tuple[int, int]:
        """In place of `triton_tiles.device_of`."""
        return self.capability // 10, self.multiprocessors


H100, A100 = Chip("H100", 90, 132), Chip("A100", 80, 108)


class Compiled(NamedTuple):
    """One kernel as one launch wants it, and what it takes of the chip."""

    kernel: str
    constants: dict[str, Any]  # its constexpr parameters by name
    registers: int  # a thread
    spilled: int  # bytes a thread: its stack, which holds what found no register
    shared: int  # bytes a program, tiles in flight included
    ptx: str  # without line numbers, so that it differs only where the code does


class _Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, chip: Chip) -> None:
        self.target = GPUTarget("cuda", chip.capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _usage(cubin: bytes) -> dict[str, int]:
    """What the binary says that it takes, read with the cuobjdump that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return {word: int(number) for word, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def _asking() -> list[ModuleType]:
    """The modules of the engine that ask what device a tensor lies on."""
    return [x for name, x in sys.modules.items() if name.startswith("fusedhead.kernels.") and hasattr(x, "device_of")]


@contextmanager
def absent_gpu(chip: Chip = H100) -> Iterator[list[Compiled]]:
    """Inside, a launch on tensors of device "meta" compiles its kernel and adds it to the list, once.

    A kernel that does not compile raises what Triton raises. Modules of the engine have to be imported before.
    """
    seen: set[int] = set()
    listed: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        done = run(kernel, *args, grid=grid, warmup=True, **options)
        done = done.result() if hasattr(done, "result") else done
        if id(done) not in seen:
            seen.add(id(done))
            constants = {p.name: x for p, x in zip(kernel.params, args) if p.is_constexpr}
            usage = _usage(done.asm["cubin"])
            shared = done.metadata.shared + usage["SHARED"]
            spilled = usage["STACK"] + usage["LOCAL"]
            name = kernel.fn.__name__
            listed.append(Compiled(name, constants, usage["REG"], spilled, shared, done.asm["ptx"]))

    with ExitStack() as stack:
        for owner, name, stand_in in (
            (JITFunction, "run", compile_only),
            (driver, "_active", _Driver(chip)),
            (triton.knobs.compilation, "disable_line_info", True),
            *((x, "device_of", chip.answer) for x in _asking()),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield listed

"""``fusedhead env``: the facts that a bug report needs, none of them private.

Versions, the chip and its engine, options and where each was set, verdicts of self-checks, cached files, patches in
force, missing names of torch. No other environment variable is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fusedhead import compat, options
from fusedhead.kernels import self_check
from fusedhead.kernels.user_cache import cache_file, read_json
from fusedhead.lowering.cache_key import source_hash
from fusedhead.run.enable import changes, disable, enable
from fusedhead.version import __version__

PACKAGES = (
    "triton", "transformers", "accelerate", "trl", "peft", "lightning", "torchtune", "torchao", "liger-kernel",
    "cut-cross-entropy", "jinja2", "rich",
)  # fmt: skip
VARIABLES = ("TORCH_LOGS", "TORCH_TRACE", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "TORCHINDUCTOR_CACHE_DIR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print data in place of text")


def execute(arguments: argparse.Namespace, parser: argparse.ArgumentParser, rest: Sequence[str]) -> int:
    facts = process_environment()
    print(json.dumps(facts, indent=1) if arguments.json else environment_text(facts))
    return 0


def process_environment() -> dict[str, dict[str, str]]:
    """The sections, in the order of the text. An entry that cannot be found out says why."""
    sections: dict[str, Callable[[], dict[str, str]]] = {
        "versions": versions,
        "device": device,
        "options": settings,
        "variables": variables,
        "self-checks": verdicts,
        "files": files,
        "changes": options_in_force,
    }
    return {name: or_failure(find) for name, find in sections.items()}


def or_failure(find: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return find()
    except Exception as error:  # a broken driver may be the bug to report
        return {"failed": f"{type(error).__name__}: {error}"}


def versions() -> dict[str, str]:
    facts = {
        "fusedhead": f"{__version__} (sources {source_hash().hex()[:12]})",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
    }
    if compat.missing:
        facts["missing in this torch"] = ", ".join(compat.missing)
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts


def device() -> dict[str, str]:
    runtime = torch.version.hip or torch.version.cuda
    facts = {"built for": f"{'ROCm' if torch.version.hip else 'CUDA'} {runtime}" if runtime else "the CPU"}
    if not torch.cuda.is_available():
        return {**facts, "GPU": "none that torch can use", "engine": "torch windows"}
    from fusedhead.kernels.chips import triton_serves

    for at in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(at)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        facts[f"GPU {at}"] = f"{properties.name}, capability {capability}, {memory}"
    return {**facts, "engine": "Triton windows" if triton_serves() else "torch windows"}


def settings() -> dict[str, str]:
    """Every option with its value and the origin of it."""
    values, _ = options.split_options(None)
    return {name: f"{value!r} ({install_origin(name)})" for name, value in asdict(values).items()}


def install_origin(name: str) -> str:
    variable = options.ENVIRONMENT + name.upper()
    if name in options.process_wide:
        return "fusedhead.enable"
    return variable if os.environ.get(variable) else "default"


def variables() -> dict[str, str]:
    unknown = options.check_environment()
    shown = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    return {**shown, **{name: f"{os.environ.get(name, '')} (nothing reads it)" for name in unknown}}


def verdicts() -> dict[str, str]:
    """The cached verdicts of the kernels' self-checks on this machine's GPUs."""
    kept = read_json(self_check.kept_in(), "delete it")
    return {name: json.dumps(verdict) for name, verdict in kept.items()} or {"none": "no kernel had to be checked here"}


def files() -> dict[str, str]:
    places = {
        "tuned tiles": cache_file("tiles.json", "FUSEDHEAD_TILES"),
        "self-checks": self_check.kept_in(),
        "package": Path(options.__file__).parent,
    }
    shown = {name: f"{at}{'' if at.exists() else ' (not there)'}" for name, at in places.items()}
    return {**shown, "Inductor's cache": inductor_cache()}


def inductor_cache() -> str:
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        return cache_dir()
    except ImportError:  # it has moved
        return os.environ.get("TORCHINDUCTOR_CACHE_DIR", "where this torch puts it")


def options_in_force() -> dict[str, str]:
    """The patches of other packages in this process, or those that `enable` would make here."""
    changed, note = changes(), ""
    if not changed:
        enable()
        changed, note = changes(), "with fusedhead.enable or fusedhead run, "
        disable()
    return {change.where: f"{change.why} ({note}{change.state})" for change in changed}


def environment_text(sections: dict[str, dict[str, Any]]) -> str:
    blocks = []
    for name, facts in sections.items():
        if facts:
            width = max(map(len, facts))
            blocks.append("\n".join([name, *(f"  {fact:{width}}  {value}" for fact, value in facts.items())]))
    return "\n\n".join(blocks)

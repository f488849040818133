"""Inductor as the backend calls it: its settings, this package's key in its caches, this package's passes on its
graphs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from torch.fx import Graph

from fusedhead.compat import CustomGraphPass, InductorWrapper, trace_artifact, trace_handlers
from fusedhead.inductor.call_below_autograd import call_below_autograd
from fusedhead.inductor.scale_in_place import scale_in_place
from fusedhead.lowering.cache_key import source_hash

log = logging.getLogger("fusedhead")

# This package's passes on Inductor's graphs after it has traced the gradients, in order.
POST_GRAD: tuple[tuple[str, Callable[[Graph], None]], ...] = (
    ("scale-gradients-in-place", scale_in_place),
    ("call-below-autograd", call_below_autograd),
)


class KeyedBySource(CustomGraphPass):
    """A pass whose key in the compile caches is this package's sources.

    AOTAutograd's key covers the rewritten graph and not the Python behind its ops. Without this pass, an upgrade of the
    package would keep serving compiled graphs with the old backward (pytorch#144344). Passes that the user has
    configured still run and are still part of the key; ``package_pass`` comes last.
    """

    def __init__(self, users: Any, package_pass: Callable[[Graph], None] | None = None) -> None:
        self.users = list(users) if isinstance(users, (list, tuple)) else [users] if users else []
        self.package_pass = package_pass

    def __call__(self, graph: Graph) -> None:
        for users_pass in self.users:
            users_pass(graph)
        if self.package_pass is not None:
            self.package_pass(graph)

    def uuid(self) -> Any:
        keys = [users_pass.uuid() if hasattr(users_pass, "uuid") else None for users_pass in self.users]
        return None if None in keys else (source_hash(), *keys)


class Inductor(InductorWrapper):
    """Inductor as ``torch.compile`` calls it. It stays Inductor while `enable` patches the base class."""

    __call__ = InductorWrapper.__call__


def keyed(config: dict[str, Any]) -> dict[str, Any]:
    """Inductor's settings with this package's sources in the keys of its caches."""
    from torch._inductor import config as inductor_config

    def setting(name: str) -> Any:
        return config.get(name, getattr(inductor_config, name))

    passes = {"joint_custom_pre_pass": KeyedBySource(setting("joint_custom_pre_pass"))}
    if not setting("post_grad_custom_post_pass") and not cuda_graphs(config):
        passes["post_grad_custom_post_pass"] = KeyedBySource(None, own_passes)
    return {**config, **passes}


def own_passes(graph: Graph) -> None:
    """Run `POST_GRAD`. The debug log and the structured trace get the graph after each pass that changed it."""
    shown = log.isEnabledFor(logging.DEBUG) or bool(trace_handlers())
    text = str(graph) if shown else ""
    for name, run in POST_GRAD:
        before, started = text, time.perf_counter()
        run(graph)
        milliseconds = (time.perf_counter() - started) * 1e3
        text = str(graph) if shown else ""
        if text != before:
            log.debug("after %s (%.2f ms):\n%s", name, milliseconds, text)
            trace_artifact(f"fusedhead_after_{name}", lambda: str(graph))


def cuda_graphs(config: dict[str, Any]) -> bool:
    """Whether graphs compiled with these settings use CUDA graphs. Inductor's configuration decides where they do not
    say.
    """
    from torch._inductor import config as inductor_config

    return bool(config.get("triton.cudagraphs", inductor_config.triton.cudagraphs))


def overwrites(compiler: Any) -> bool:
    """Whether the next run of a compiled graph overwrites the memory of its outputs."""
    return cuda_graphs(getattr(compiler, "config", {}))

"""Compatibility: every private name of torch that this package uses, in one place.

Each name is looked up once, when the package is imported. A name that a newer torch lacks becomes a stand-in and an
entry of `missing`: the import does not fail, and the backend leaves every graph to Inductor, with one warning that
lists the missing names (`unusable`). `tests/compat/` fails with the name. `kernels/` and `lowering/` are below this
file and guard their own private names; the same tests list these.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule

if TYPE_CHECKING:  # the types of the names below, for type checkers
    from torch import _TorchCompileInductorWrapper as InductorWrapper  # noqa: F401
    from torch._C import DispatchKey  # noqa: F401
    from torch._decomp import decomposition_table  # noqa: F401
    from torch._dispatch.python import enable_python_dispatcher  # noqa: F401
    from torch._dynamo.source import AttrSource, ConstantSource  # noqa: F401
    from torch._guards import TracingContext  # noqa: F401
    from torch._inductor.custom_graph_pass import CustomGraphPass  # noqa: F401
    from torch._ops import HigherOrderOperator, OpOverload  # noqa: F401
    from torch._subclasses.fake_tensor import (  # noqa: F401
        FakeTensor,
        FakeTensorMode,
        maybe_get_fake_mode,
        unset_fake_temporarily,
    )
    from torch.amp.autocast_mode import _enter_autocast as enter_autocast  # noqa: F401
    from torch.amp.autocast_mode import _exit_autocast as exit_autocast  # noqa: F401
    from torch.autograd.function import BackwardCFunction  # noqa: F401
    from torch.fx._lazy_graph_module import _make_graph_module as make_graph_module  # noqa: F401
    from torch.fx._lazy_graph_module import _use_lazy_graph_module as use_lazy_graph_module  # noqa: F401
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: F401
    from torch.utils._device import DeviceContext  # noqa: F401
    from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401
    from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes  # noqa: F401
    from torch.utils._pytree import (  # noqa: F401
        tree_flatten,
        tree_leaves,
        tree_map,
        tree_map_only,
        tree_unflatten,
    )
    from torch.utils._sympy.printers import PythonPrinter  # noqa: F401

    clear_function_transforms: Callable[[], Any]
    disable_torch_function_subclass: Any
    dispatch_modes: Callable[[], list[Any]]
    function_modes: Callable[[], list[Any]]
    function_transform_level: Callable[[], int | None]
    excluded_dispatch_keys: Callable[[], Any]
    force_dispatch_keys: Callable[[Any, Any], Any]
    graph_task: Callable[[], int]  # the backward that this thread is in, -1 for none
    has_kernel_for_key: Callable[[str, str], bool]
    included_dispatch_keys: Callable[[], Any]
    make_wrapper_subclass: Callable[..., Any]
    saved_tensors_hooks_enabled: Callable[[], bool]
    set_grad_enabled: Callable[[bool], None]
    skip_frames_of: Callable[[str], None]
    top_saved_tensors_hooks: Callable[[bool], Any]
    throw_on_data_ptr: Callable[[torch.Tensor], None]
    torch_function_enabled: Callable[[], bool]

log = logging.getLogger("fusedhead")

# the name in this file: the module of torch, and the name there
NAMES: Mapping[str, tuple[str, str]] = {
    "AttrSource": ("torch._dynamo.source", "AttrSource"),
    "BackwardCFunction": ("torch.autograd.function", "BackwardCFunction"),
    "ConstantSource": ("torch._dynamo.source", "ConstantSource"),
    "CustomGraphPass": ("torch._inductor.custom_graph_pass", "CustomGraphPass"),
    "DeviceContext": ("torch.utils._device", "DeviceContext"),
    "DispatchKey": ("torch._C", "DispatchKey"),
    "FakeTensor": ("torch._subclasses.fake_tensor", "FakeTensor"),
    "FakeTensorMode": ("torch._subclasses.fake_tensor", "FakeTensorMode"),
    "HigherOrderOperator": ("torch._ops", "HigherOrderOperator"),
    "InductorWrapper": ("torch", "_TorchCompileInductorWrapper"),
    "OpOverload": ("torch._ops", "OpOverload"),
    "PythonPrinter": ("torch.utils._sympy.printers", "PythonPrinter"),
    "ShapeEnv": ("torch.fx.experimental.symbolic_shapes", "ShapeEnv"),
    "TorchDispatchMode": ("torch.utils._python_dispatch", "TorchDispatchMode"),
    "TracingContext": ("torch._guards", "TracingContext"),
    "clear_function_transforms": ("torch._functorch.pyfunctorch", "temporarily_clear_interpreter_stack"),
    "decomposition_table": ("torch._decomp", "decomposition_table"),
    "disable_current_modes": ("torch.utils._python_dispatch", "_disable_current_modes"),
    "disable_torch_function_subclass": ("torch._C", "DisableTorchFunctionSubclass"),
    "dispatch_modes": ("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack"),
    "enable_python_dispatcher": ("torch._dispatch.python", "enable_python_dispatcher"),
    "enter_autocast": ("torch.amp.autocast_mode", "_enter_autocast"),
    "exit_autocast": ("torch.amp.autocast_mode", "_exit_autocast"),
    "excluded_dispatch_keys": ("torch._C", "_dispatch_tls_local_exclude_set"),
    "force_dispatch_keys": ("torch._C", "_ForceDispatchKeyGuard"),
    "function_modes": ("torch.overrides", "_get_current_function_mode_stack"),
    "function_transform_level": ("torch._C._functorch", "maybe_current_level"),
    "graph_task": ("torch._C", "_current_graph_task_id"),
    "has_kernel_for_key": ("torch._C", "_dispatch_has_kernel_for_dispatch_key"),
    "included_dispatch_keys": ("torch._C", "_dispatch_tls_local_include_set"),
    "make_graph_module": ("torch.fx._lazy_graph_module", "_make_graph_module"),
    "make_wrapper_subclass": ("torch", "Tensor._make_wrapper_subclass"),
    "maybe_get_fake_mode": ("torch._subclasses.fake_tensor", "maybe_get_fake_mode"),
    "saved_tensors_hooks_enabled": ("torch._C._autograd", "_saved_tensors_hooks_is_enabled"),
    "set_grad_enabled": ("torch._C", "_set_grad_enabled"),
    "skip_frames_of": ("torch._dynamo.trace_rules", "add"),
    "throw_on_data_ptr": ("torch._C", "_set_throw_on_mutable_data_ptr"),
    "top_saved_tensors_hooks": ("torch._C._autograd", "_top_saved_tensors_default_hooks"),
    "torch_function_enabled": ("torch._C", "_is_torch_function_enabled"),
    "tree_flatten": ("torch.utils._pytree", "tree_flatten"),
    "tree_leaves": ("torch.utils._pytree", "tree_leaves"),
    "tree_map": ("torch.utils._pytree", "tree_map"),
    "tree_map_only": ("torch.utils._pytree", "tree_map_only"),
    "tree_unflatten": ("torch.utils._pytree", "tree_unflatten"),
    "unset_fake_temporarily": ("torch._subclasses.fake_tensor", "unset_fake_temporarily"),
    "use_lazy_graph_module": ("torch.fx._lazy_graph_module", "_use_lazy_graph_module"),
}

# Members of objects that the package reads, including Inductor's settings.
MEMBERS: tuple[tuple[str, str], ...] = (
    ("torch", "UntypedStorage._cdata"),
    ("torch._inductor.config", "joint_custom_pre_pass"),
    ("torch._inductor.config", "post_grad_custom_post_pass"),
    ("torch._inductor.config", "triton.cudagraphs"),
    ("torch.fx", "Node._rename"),
    ("torch.fx", "Node.__lt__"),
    ("torch.fx", "Graph.find_nodes"),
    ("torch.ops.aten", "add.Tensor._schema"),
    ("torch.ops.aten", "add.Tensor._overloadname"),
    ("torch.ops.aten", "add.Tensor._overloadpacket"),
)
# Members that only an instance has: a graph of one node.
MEMBERS_OF_A_GRAPH = ("_codegen", "_tracer_cls")
MEMBERS_OF_A_NODE = ("_erased",)


class MissingName(RuntimeError):
    """Raised by the use of a private name that this torch does not have."""


class _StandIn(type):
    """A stand-in for a missing name: it has no instances, and calling it raises."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise MissingName(f"torch {torch.__version__} has no {cls.__name__}")


def lookup(module: str, name: str) -> Any:
    """``name``, which may have dots, of a module. Raises ImportError or AttributeError."""
    value: Any = torch.ops.aten if module == "torch.ops.aten" else import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def found_names() -> tuple[dict[str, Any], list[str]]:
    """The object for each of `NAMES`, and the full names of the missing ones, members included."""
    values: dict[str, Any] = {}
    gone: list[str] = []
    for key, (module, name) in NAMES.items():
        try:
            values[key] = lookup(module, name)
        except Exception:  # a moved module may raise anything
            gone.append(f"{module}.{name}")
            values[key] = _StandIn(f"{module}.{name}", (), {})
    for module, name in MEMBERS:
        try:
            lookup(module, name)
        except Exception:
            gone.append(f"{module}.{name}")
    graph = Graph()
    node = graph.placeholder("x")
    gone += [f"torch.fx.Graph.{name}" for name in MEMBERS_OF_A_GRAPH if not hasattr(graph, name)]
    gone += [f"torch.fx.Node.{name}" for name in MEMBERS_OF_A_NODE if not hasattr(node, name)]
    return values, gone


_values, missing = found_names()
globals().update(_values)


@lru_cache(maxsize=1)
def unusable() -> str:
    """Why the pass cannot run on this torch, or "". Warns once a process."""
    if not missing:
        return ""
    why = f"torch {torch.__version__} has no {', '.join(missing)}, which fusedhead reads graphs with"
    log.warning("fusedhead: %s: everything is left to Inductor. A newer fusedhead may know this torch.", why)
    return why


def plain_inductor(gm: GraphModule, inputs: Any, mode: str | None, settings: dict[str, Any]) -> Callable[..., Any]:
    """Compile a graph with Inductor through public names only."""
    from torch import _inductor

    of_mode = _inductor.list_mode_options(mode) if mode else {}
    return _inductor.compile(gm, inputs, options={**of_mode, **settings})


def trace_handlers() -> list[Any]:
    """The handlers of the structured trace; none where this torch does not tell."""
    logs = getattr(getattr(torch, "_logging", None), "_internal", None)
    return list(getattr(getattr(logs, "trace_log", None), "handlers", ()))


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Write an artifact of the structured trace, where this torch has one."""
    trace = getattr(getattr(torch, "_logging", None), "trace_structured", None)
    if trace is not None:
        trace("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


# Nodes of a Dynamo graph that switch a mode. A graph that holds an unknown one is not read, since its toggle would be
# missed.
MODES = re.compile(r"grad_enabled|grad_mode|no_grad|inference_mode|autocast")
INFERENCE = frozenset({"_enter_inference_mode", "_exit_inference_mode"})


@lru_cache(maxsize=4096)
def _unknown_mode(target: Any) -> bool:
    """An op of the dispatcher that takes a tensor (``aten::_no_grad_zero_``) does not count: it restores the mode."""
    name = getattr(target, "__name__", "")
    toggles = (_values["set_grad_enabled"], _values["enter_autocast"], _values["exit_autocast"])
    return bool(MODES.search(name)) and target not in toggles and name not in INFERENCE and not _takes_tensors(target)


def _takes_tensors(target: Any) -> bool:
    """Whether a target is one of torch's ops or packets and takes a tensor."""
    packet = getattr(target, "overloadpacket", target)
    if not callable(getattr(packet, "overloads", None)):
        return False
    schemas = [getattr(packet, name)._schema for name in packet.overloads()]
    return all(s.name.startswith("aten::") and any("Tensor" in str(a.type) for a in s.arguments) for s in schemas)


def unknown_modes(gm: GraphModule) -> Iterable[str]:
    """The unknown functions in a graph, or in a graph inside it, that switch a grad or autocast mode."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and _unknown_mode(node.target):
                    yield f"{getattr(node.target, '__module__', '')}.{node.target.__name__}"

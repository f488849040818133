"""What is used of torch that torch does not promise: each name is there, and a torch without it is Inductor.

A new torch fails here first, with the name that has changed.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule

from fusedhead import compat
from fusedhead.backend import FusedHeadError, run_pass
from fusedhead.graph.nodes import name_of
from fusedhead.kernels.tokenwise import compilation
from fusedhead.options import split_options

ROOT = Path(__file__).parents[2]
ALL = (*compat.NAMES.values(), *compat.MEMBERS)


NAMED = pytest.mark.parametrize(("module", "name"), ALL, ids=map(".".join, ALL))


class Without:
    """A module without some of its names."""

    def __init__(self, module: Any, hidden: set[str]) -> None:
        self.module, self.hidden = module, hidden

    def __getattr__(self, name: str) -> Any:
        if name in self.hidden:
            raise AttributeError(name)
        return getattr(self.module, name)


@NAMED
def test_a_name_is_where_it_is_looked_for(module: str, name: str) -> None:
    compat.lookup(module, name)


@NAMED
def test_a_name_that_is_gone_is_said_and_cannot_be_used(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compat.lookup

    def lookup(where: str, what: str) -> Any:
        if (where, what) == (module, name):
            raise AttributeError(what)
        return real(where, what)

    monkeypatch.setattr(compat, "lookup", lookup)
    values, gone = compat.found_names()
    assert gone == [f"{module}.{name}"]
    for own in (own for own, pair in compat.NAMES.items() if pair == (module, name)):
        assert not isinstance(torch.ones(1), values[own])
        with pytest.raises(compat.MissingName, match=re.escape(f"{module}.{name}")):
            values[own]()


def test_nothing_is_missing() -> None:
    assert compat.missing == []
    assert compat.unusable() == ""


def captured(program: Any, *inputs: Tensor) -> GraphModule:
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm

    torch.compile(program, backend=backend, fullgraph=True)(*inputs)
    return graphs[0]


def test_dynamo_switches_modes_by_the_functions_that_are_looked_for() -> None:
    def program(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = y @ y
        with torch.inference_mode():
            return z + 1

    gm = captured(program, torch.randn(3, 3))
    used = {
        node.target for node in gm.graph.nodes if node.op == "call_function" and node.meta.get("example_value") is None
    }
    assert {compat.set_grad_enabled, compat.enter_autocast, compat.exit_autocast} <= used
    assert not set(compat.unknown_modes(gm))


@pytest.mark.parametrize("attribute", ["T", "mT", "H", "mH", "real"])
def test_an_attribute_of_a_tensor_is_read_by_its_name_whatever_dynamo_makes_of_it(attribute: str) -> None:
    gm = captured(lambda x: getattr(x, attribute) + 1, torch.randn(3, 3))
    assert [name_of(node) for node in gm.graph.nodes if node.op.startswith("call_")] == [attribute, "add"]


def test_ops_that_compute_without_a_gradient_switch_no_mode() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    for op in (torch.ops.aten._no_grad_zero_, torch.ops.aten._no_grad_fill_.default):
        x = graph.call_function(op, (x, *((1.0,) * (op is torch.ops.aten._no_grad_fill_.default))))
    graph.output((x,))
    assert not set(compat.unknown_modes(GraphModule(torch.nn.Module(), graph)))


def _set_grad_enabled_anew(mode: bool) -> None:
    """What a torch might call its toggle."""
    torch.set_grad_enabled(mode)


def test_a_toggle_of_another_name_is_no_graph_that_is_read(caplog: pytest.LogCaptureFixture) -> None:
    graph = Graph()
    h, w, y = map(graph.placeholder, "hwy")
    graph.call_function(_set_grad_enabled_anew, (False,))
    graph.output((graph.call_function(F.cross_entropy, (graph.call_function(F.linear, (h, w)), y)),))
    gm = GraphModule(torch.nn.Module(), graph)
    left, report, _ = run_pass(gm, split_options(None)[0])
    assert left is gm
    assert "_set_grad_enabled_anew" in report.errors[0]
    assert "_set_grad_enabled_anew" in caplog.text
    with pytest.raises(FusedHeadError, match="_set_grad_enabled_anew"):
        run_pass(gm, split_options({"fusedhead.strict": True})[0])


def test_without_their_names_autograd_s_keys_are_those_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.randn(3), torch.randn(3)]

    def vjp(tensors: list[Tensor]) -> Tensor:
        x = tensors[0].detach().requires_grad_()
        return torch.autograd.grad(x.square().sum(), x)[0] * tensors[1]

    def renamed() -> None:
        raise AttributeError

    monkeypatch.setattr(compilation, "autograd_keys", renamed)
    torch.testing.assert_close(compilation.traced(vjp, inputs, False, 3)(inputs), 2 * inputs[0] * inputs[1])


# A process that has imported torch, and forks a child for each module that names are looked up in. The child imports
# the package from a torch whose module does not have them.
WITHOUT = (
    f"""
from typing import Any
{inspect.getsource(Without)}
"""
    + """
import importlib, json, logging, os, sys, warnings
import torch, torch._dynamo, torch._inductor.compile_fx, torch._inductor.custom_graph_pass
import torch.nn.functional as F
from torch.fx import Graph
real = importlib.import_module

def loss(h, w, y):
    return F.cross_entropy(F.linear(h, w), y)

def inputs():
    torch.manual_seed(0)
    return torch.randn(8, 4), torch.randn(16, 4, requires_grad=True), torch.randint(0, 16, (8,))

with torch.no_grad():  # imports for all; a backward before a fork would be none after it
    torch.compile(loss)(*inputs())
torch._dynamo.reset()

def child(module, names, way, whole):
    hidden = {name.split(".")[0] for name in names}
    importlib.import_module = lambda m: Without(real(m), hidden) if m == module else real(m)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("fusedhead").addHandler(handler)
    import fusedhead
    import fusedhead.run.cli
    from fusedhead import compat
    assert compat.missing, "nothing is hidden"
    if way == "enable":
        fusedhead.enable()
    seen = []
    if not whole:  # in place of Inductor, which is reached or not
        def run_as_it_is(gm, inputs, *rest, **settings):
            seen.append([node.target for node in gm.graph.nodes])
            return gm.forward
        torch._inductor.compile_fx.compile_fx = run_as_it_is
    step = torch.compile(loss) if way == "enable" else torch.compile(loss, backend="fusedhead")
    h, w, y = inputs()
    optimizer, losses = torch.optim.SGD([w], 0.5), []
    for _ in range(3):
        value = step(h, w, y)
        torch.testing.assert_close(value, loss(h, w, y))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[2] < losses[0]
    assert whole or [F.cross_entropy in targets for targets in seen] == [True], seen
    torch._dynamo.reset()
    said = [m for m in messages if "left to Inductor" in m]
    assert len(said) == 1 and all(f"{module}.{name}" in said[0] for name in names), messages

for line in sys.stdin:
    given = json.loads(line)
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # a fork leaves torch's pool of threads to whoever asks first, and two may
            child(*given)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
)


@pytest.fixture(scope="module")
def hiding() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", WITHOUT], stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


INDUCTOR = ("torch", "torch._C")  # the modules that are hidden and have Inductor compile
MODULES = {module: [name for where, name in ALL if where == module] for module, _ in ALL if module != "torch.ops.aten"}


@pytest.mark.parametrize(
    ("module", "way"), [*((module, "named") for module in MODULES), ("torch", "enable"), ("torch._C", "enable")]
)
def test_a_torch_without_names_compiles_and_trains_as_inductor(
    module: str, way: str, hiding: subprocess.Popen[str]
) -> None:
    """Inductor compiles, for a module whose names are reached by ``enable`` and for one; for others it is reached."""
    assert hiding.stdin is not None
    assert hiding.stdout is not None
    hiding.stdin.write(json.dumps([module, MODULES[module], way, module in INDUCTOR]) + "\n")
    hiding.stdin.flush()
    assert hiding.stdout.readline() == "0\n"


# Private names outside of compat.py, each with what stands behind it there.
ELSEWHERE = {
    "lowering/shards.py": "aten._assert_async, for what the ranks of a device disagree about",
    "lowering/shard_labels.py": "aten._assert_async, for labels of a device",
    "fusion_pass/functional/linear_cross_entropy.py": "aten._assert_async, for labels of a device nobody waits for",
    "fusion_pass/run/enable.py": "an edit that cannot be made is logged, listed by changes(), and the others stand",
    "fusion_pass/run/compile_eager.py": "a model that cannot be watched stays eager, and the log says so",
    "fusion_pass/estimate.py": "each setting is looked for, and none is needed",
    "fusion_pass/run/environment.py": "the folder is said to be torch's",
    "lowering/ranges.py": "without it no frame of a snapshot of memory has a head's name",
    "fusion_pass/inductor/config.py": "its settings are among compat.MEMBERS",
    "kernels/tokenwise/compilation.py": "autograd's keys on a thread of its own",
    "kernels/torch_engine/cpp_library.py": "without them torch ops compute what the C++ kernel would",
    "kernels/triton_engine/float8/products.py": "without it `chips.float8_serves` says no: gradients stay as they are",
}
PROMISED = {"__version__", "__name__"}


def private(tree: ast.AST) -> set[str]:
    """The private names of torch that a module's code spells out."""
    result = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            result |= {name for name in names if any(part.startswith("_") for part in name.split("."))}
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        parts = text.split(".")
        if parts[0] == "torch" and any(p.startswith("_") and p not in PROMISED for p in parts):
            result.add(text)
    return result


def test_no_other_file_uses_private_names_of_torch() -> None:
    folders = ("fusion_pass", "lowering", "kernels")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path.name != "compat.py"]
    used = {str(path.relative_to(ROOT)): private(ast.parse(path.read_text())) for path in files}
    assert {path for path, names in used.items() if names} == set(ELSEWHERE), {p: n for p, n in used.items() if n}

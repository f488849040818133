"""Heads that nobody compiles: eager projections hand out deferred logits, and what a program sees is as it was."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedhead
from fusedhead.deferred.tensor import DeferredLogits
from fusedhead.eager import heads
from fusedhead.report import observers
from fusedhead.report.summary import Summary
from tests.eager_stack import backend

V, D = 1024, 16
ORIGINAL = nn.Linear.forward


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    yield
    fusedhead.disable()
    for module in list(heads.HEADS):
        del heads.HEADS[module]
    nn.Linear.forward = ORIGINAL  # type: ignore[method-assign]


@pytest.fixture
def summary() -> Iterator[Summary]:
    heard = Summary()
    remove = observers.add(heard.add)
    yield heard
    remove()


class Model(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.lm_head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.mix(self.embed(x))))

    def calculate_loss(model, x: Tensor, y: Tensor) -> Tensor:  # named as some name it
        return F.cross_entropy(model.forward(x).flatten(0, 1), y.flatten())


def batch(rows: int = 4, length: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randint(0, V, (rows, length)), torch.randint(0, V, (rows, length))


def step(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor] = F.cross_entropy) -> list[Tensor]:
    model.zero_grad()
    value = loss(model(x).flatten(0, 1), y.flatten())
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters())]  # type: ignore[misc]


def same(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    for got, eager, true in zip(ours, plain, exact, strict=True):
        least = 4 * torch.finfo(eager.dtype).eps * true.abs().max()
        assert (got - true).abs().max() <= torch.maximum(1.5 * (eager - true).abs().max(), least)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_loss_of_an_eager_head_has_the_numbers_of_eager_code(bias: bool, summary: Summary) -> None:
    model, (x, y) = Model(bias), batch()
    exact, plain = step(copy.deepcopy(model).double(), x, y), step(model, x, y)
    small = step(copy.deepcopy(model).double(), x[:3], y[:3]), step(model, x[:3], y[:3])
    assert fusedhead.defer(model) is model
    same(step(model, x, y), plain, exact)
    same(step(model, x[:3], y[:3]), small[1], small[0])
    (head,) = summary.heads()
    assert (head.fused, head.module, head.logits) == (True, "lm_head", "deferred")
    assert "test_heads.py" in head.where
    assert (head.run.answered.value, head.run.built.total) == (2, 0)
    assert "never built" in str(head)


def test_under_autocast_it_has_the_numbers_of_a_compiled_model() -> None:
    model, (x, y) = Model(True), batch()
    reference = torch.compile(copy.deepcopy(model), backend=backend(lambda report: None))
    fusedhead.defer(model)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, compiled in zip(step(model, x, y), step(reference, x, y), strict=True):
            assert torch.equal(ours, compiled)


def test_a_model_that_is_used_through_a_method_is_fused(summary: Summary) -> None:
    fusedhead.enable()
    model, (x, y) = Model(), batch()
    model.calculate_loss(x, y).backward()
    F.cross_entropy(model.forward(x).flatten(0, 1), y.flatten()).backward()
    (head,) = summary.heads()
    assert (head.run.answered.value, head.module) == (2, "lm_head")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_blocks_and_a_loss_that_are_compiled_around_an_eager_head(summary: Summary) -> None:
    model, (x, y) = Model(), batch()
    plain, exact = step(model, x, y), step(copy.deepcopy(model).double(), x, y)
    fusedhead.defer(model.lm_head)
    model.mix.compile(backend=backend(lambda report: None))
    reports: list[Any] = []
    loss = torch.compile(lambda z, y: F.cross_entropy(z.float(), y), backend=backend(reports.append))
    same(step(model, x, y, loss), plain, exact)
    assert [head.fused for report in reports for head in report.heads] == [True]
    (head,) = summary.heads()
    assert (head.run.passed.value, head.run.built.total) == (1, 0)


def test_a_layer_that_is_read_by_an_activation_is_no_head_and_stops(summary: Summary) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, V), nn.Linear(V, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)))

    model, x = Mlp(), torch.randn(64, D)
    expected = model(x)
    fusedhead.enable()
    assert all(torch.equal(model(x), expected) for _ in range(5))
    (head,) = summary.heads()
    assert (head.module, head.run.built.total, head.run.at_once.total) == ("up", 2, 3)
    assert "no longer deferred, since what reads them is no loss: linear at test_heads.py" in str(head)


def test_a_look_at_the_first_logits_does_not_stop_a_head(summary: Summary) -> None:
    model, (x, y) = Model(), batch()
    fusedhead.defer(model)
    model(x).tolist()
    for _ in range(3):
        step(model, x, y)
    (head,) = summary.heads()
    assert (head.run.built.total, head.run.answered.value, head.run.at_once.total) == (1, 3, 0)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model: nn.Module) -> nn.Module:
    other = Model()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("again", [copied, pickled, saved, loaded])
def test_a_model_is_copied_and_saved_as_before(again: Callable[[nn.Module], nn.Module]) -> None:
    model, (x, y) = Model(), batch()
    before = set(vars(model.lm_head))
    fusedhead.defer(model)
    step(model, x, y)
    assert set(vars(model.lm_head)) == before
    other = again(model)
    assert type(other(x)) is Tensor  # a copy is nobody's yet
    assert torch.equal(other(x), model(x))


def test_functional_call_takes_other_weights(summary: Summary) -> None:
    model, (x, y) = Model(), batch()
    fusedhead.defer(model)
    weights = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    loss = F.cross_entropy(torch.func.functional_call(model, weights, (x,)).flatten(0, 1), y.flatten())
    grads = torch.autograd.grad(loss, list(weights.values()))
    other = Model()
    other.load_state_dict(weights)
    same([loss.detach(), *grads], step(other, x, y), step(copy.deepcopy(other).double(), x, y))
    assert summary.heads()[0].run.answered.value == 1


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def under_a_mode(mode: Callable[[], Any]) -> Callable[[nn.Module, Tensor], Any]:
    def run(model: nn.Module, x: Tensor) -> Any:
        with mode():
            return model(x)

    return run


PLAIN: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "a function mode": under_a_mode(Functions),
    "a dispatch mode": under_a_mode(Ops),
    "no torch function": under_a_mode(torch._C.DisableTorchFunctionSubclass),
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "checkpointing": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "jit.trace": lambda model, x: torch.jit.trace(model, x)(x),
    "jit.script": lambda model, x: torch.jit.script(model)(x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model)(x) + 0,
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module()(x),
}


@pytest.mark.parametrize("how", PLAIN)
def test_what_records_or_changes_calls_gets_plain_ones(how: str) -> None:
    model, (x, _) = Model(), batch()
    expected = model(x)
    fusedhead.defer(model)
    found = PLAIN[how](model, x)
    assert type(found) is Tensor or how == "fx"
    torch.testing.assert_close(found, expected)


def test_a_default_device_is_no_mode_that_matters() -> None:
    model, (x, _) = Model(), batch()
    fusedhead.defer(model)
    with torch.device("cpu"):
        assert type(model(x)) is DeferredLogits


def test_a_weight_that_is_computed_is_computed_once_a_call() -> None:
    head = nn.utils.parametrizations.spectral_norm(nn.Linear(D, V, bias=False))
    other, h, y = copy.deepcopy(head), torch.randn(64, D), torch.randint(0, V, (64,))
    heads.HEADS[head] = heads.EagerHead("head")
    heads.install()
    for _ in range(3):
        ours, plain = F.cross_entropy(head(h), y), F.cross_entropy(F.linear(h, other.weight), y)
        torch.testing.assert_close(ours, plain)


def test_errors_are_eager_codes_own() -> None:
    model = Model()
    fusedhead.defer(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model.lm_head(torch.randn(64, D + 1))
    with pytest.raises(RuntimeError, match="same dtype"):
        model.lm_head(torch.randn(64, D).double())


def test_dynamo_sees_torchs_own_layer() -> None:
    seen: list[str] = []

    def texts(gm: Any, inputs: Any) -> Any:
        seen.append("\n".join(f"{n.format_node()} {n.meta.get('stack_trace')}" for n in gm.graph.nodes))
        return gm.forward

    model, (x, _) = Model(True), batch()
    torch.compile(model, backend=texts, fullgraph=True)(x)
    torch.compiler.reset()
    fusedhead.defer(model)
    torch.compile(model, backend=texts, fullgraph=True)(x)
    assert seen[0] == seen[1]


def test_below_a_frame_that_dynamo_skips_nothing_of_ours_is_compiled(summary: Summary) -> None:
    model, h = Model(), torch.randn(64, D)
    fusedhead.defer(model)
    graphs: list[Any] = []

    def count(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    @torch.compiler.disable(recursive=False)
    def skipped(h: Tensor) -> Tensor:
        return model.lm_head(h)

    logits = torch.compile(lambda h: skipped(h), backend=count)(h)
    assert type(logits) is DeferredLogits
    torch.testing.assert_close(torch.logsumexp(logits, -1), torch.logsumexp(F.linear(h, model.lm_head.weight), -1))
    assert graphs == []
    assert summary.graphs == 1


def test_threads_share_one_graph(summary: Summary) -> None:
    model, (x, y) = Model(), batch()
    fusedhead.defer(model)
    gate = threading.Barrier(4)

    def run() -> None:
        gate.wait()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (summary.graphs, summary.heads()[0].run.answered.value) == (1, 4)


def test_disable_puts_torchs_forward_back() -> None:
    fusedhead.enable()
    assert nn.Linear.forward is not ORIGINAL
    fusedhead.disable()
    assert nn.Linear.forward is ORIGINAL
    assert type(Model()(batch()[0])) is Tensor


def test_options_are_read_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, _) = Model(), batch()
    fusedhead.defer(model)
    monkeypatch.setenv("FUSEDHEAD_MIN_LOGITS", "auto")
    assert type(model(x)) is Tensor
    monkeypatch.setenv("FUSEDHEAD_MIN_LOGITS", "0")
    monkeypatch.setenv("FUSEDHEAD_LOGITS", "eager")
    assert type(model(x)) is Tensor


def test_what_cannot_be_deferred_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"expects a torch.nn.Module, got int"):
        fusedhead.defer(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Linear holds no torch.nn.Linear that looks like a head"):
        fusedhead.defer(nn.Linear(4, 4))


def test_a_forward_that_is_not_torchs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(self: nn.Linear, input: Tensor) -> Tensor:
        return ORIGINAL(self, input) * 2

    monkeypatch.setattr(nn.Linear, "forward", theirs)
    with pytest.raises(RuntimeError, match="not torch's own"):
        fusedhead.defer(nn.Linear(D, V))
    fusedhead.enable()
    assert any("not torch's own" in change.state for change in fusedhead.changes())
    assert nn.Linear.forward is theirs

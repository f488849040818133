"""Traps of what surrounds a graph: optimizers, wrappers, subclasses, compile settings, transforms, sizes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import fusedhead
from tests.eager_stack import Rewritten
from tests.one_rank import one_rank
from tests.programs.claims import B, D, T, V, hidden, labels, left, right, weight


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def with_logits(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(h, w)
    return F.cross_entropy(z, y), z


def test_returned_logits_read_after_the_optimizer_step_are_never_those_of_the_new_weight() -> None:
    h, w, y = hidden(6, D), weight(), labels(6)
    expected = F.linear(h, w).detach()
    _, early = Rewritten(with_logits)(h, w, y)
    torch.testing.assert_close(early.tolist(), expected.tolist())
    value, late = Rewritten(with_logits)(h, w, y)
    value.backward()
    torch.optim.SGD([w], lr=1.0).step()
    torch.testing.assert_close(early.tolist(), expected.tolist())
    with pytest.raises(fusedhead.StaleLogits, match=r"changed in place.*before optimizer.step\(\)"):
        late.tolist()


@pytest.mark.parametrize("program", [loss, with_logits])
def test_hooks_on_saved_tensors_see_nothing_of_the_pass(program: Callable[..., Any]) -> None:
    h, w, y = hidden(6, D), weight(), labels(6)
    rewritten = Rewritten(program)
    packed: list[Tensor] = []

    def packs(x: Tensor) -> Tensor:
        packed.append(x)
        return x

    counts = []
    for _ in range(2):  # the first call compiles
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(packs, lambda x: x):
            rewritten(h, w, y)
        counts.append(len(packed))
    assert counts[0] == counts[1] > 0
    (head,) = rewritten.report.heads
    assert head.fused


def test_the_first_call_may_be_one_that_a_checkpoint_repeats() -> None:
    h, w, y = hidden(6, D), weight(), labels(6)
    checkpoint(Rewritten(loss), h, w, y, use_reentrant=False).backward()
    (expected,) = torch.autograd.grad(loss(h, w, y), h)
    torch.testing.assert_close(h.grad, expected)


def test_a_weight_that_is_a_tensor_subclass_is_left_alone() -> None:
    h, w, y = hidden(6, D), TwoTensor(torch.randn(V, D), torch.randn(V, D)), labels(6)
    rewritten = Rewritten(loss)
    got, expected = rewritten(h, w, y), loss(h, w, y)
    assert isinstance(got, TwoTensor)
    torch.testing.assert_close((got.a, got.b), (expected.a, expected.b))
    (head,) = rewritten.report.heads
    assert not head.fused
    assert "is a TwoTensor, not a plain tensor" in head.reason


def test_a_distributed_weight_is_right_fused_or_not() -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    with one_rank():
        mesh = init_device_mesh("cpu", (1,))
        h, w = (distribute_tensor(x, mesh, [p]) for x, p in ((torch.randn(6, D), Replicate()), (weight(), Shard(0))))
        y = distribute_tensor(labels(6), mesh, [Replicate()])

        def gathered(h: Any, w: Any, y: Any) -> Any:
            return F.cross_entropy(F.linear(h, w).redistribute(placements=[Replicate()]), y)

        rewritten = Rewritten(gathered)
        got = rewritten(h, w, y)
        assert isinstance(got, DTensor)
        torch.testing.assert_close(got.to_local(), gathered(h, w, y).to_local())


def test_what_is_inductors_reaches_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    seen: list[dict[str, Any]] = []

    def watch(gm: Any, inputs: Any, config_patches: dict[str, Any] | None = None, **_: Any) -> Callable[..., Any]:
        seen.append(config_patches or {})
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", watch)
    operands = hidden(6, D), weight(), labels(6)
    torch.compile(loss, backend="fusedhead", mode="reduce-overhead")(*operands)
    torch.compiler.reset()
    torch.compile(loss, backend="fusedhead", options={"max_fusion_size": 7, "fusedhead.memory": 64})(*operands)
    assert seen[0]["triton.cudagraphs"]
    assert seen[1]["max_fusion_size"] == 7
    assert not any(name.startswith("fusedhead") for patches in seen for name in patches)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_train_step_compiled_as_a_whole_is_right() -> None:
    model = nn.Linear(D, V, bias=False)
    start = model.weight.detach().clone()

    def step(h: Tensor, y: Tensor) -> Tensor:
        value = F.cross_entropy(model(h), y)
        value.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
        return value

    h, y = torch.randn(6, D), labels(6)
    expected = [step(h, y).detach() for _ in range(3)], model.weight.detach().clone()
    with torch.no_grad():
        model.weight.copy_(start)
    compiled_step = Rewritten(step)
    got = [compiled_step(h, y).detach() for _ in range(3)], model.weight.detach().clone()
    torch.testing.assert_close(got, expected)


def test_a_backward_that_is_compiled_too_is_right() -> None:
    h, w, y = hidden(6, D), weight(), labels(6)
    expected = torch.autograd.grad(loss(h, w, y), (h, w))
    compiled = torch.compile(loss, backend="fusedhead")
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        compiled(h, w, y).backward()
    torch.testing.assert_close((h.grad, w.grad), expected)


WALKERS = {
    "detached": lambda x: x.detach() if isinstance(x, Tensor) else x,
    "in float32": lambda x: x.float() if isinstance(x, Tensor) else x,
    "copied": lambda x: x.clone() if isinstance(x, Tensor) else x,
    "padded": lambda x: F.pad(x, (0, 0, 0, 2)) if isinstance(x, Tensor) and x.ndim == 2 else x,
    "gathered": lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim else x,
}


@pytest.mark.parametrize("walker", WALKERS)
def test_walkers_over_outputs_find_tensors_with_the_right_numbers(walker: str) -> None:
    """What DistributedDataParallel, accelerate and Trainer do with what a model returns."""
    h, w, y = hidden(6, D), weight(), labels(6)
    walk = WALKERS[walker]
    expected = tree_map(walk, with_logits(h, w, y))
    got = tree_map(walk, Rewritten(with_logits)(h, w, y))
    for a, b in zip(got, expected):
        assert isinstance(a, Tensor)
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
        torch.testing.assert_close(a + 0, b)


def test_a_tiny_head_is_left_alone_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEDHEAD_MIN_LOGITS")
    left(loss, hidden(6, D), weight(), labels(6), because="its 66 logits are too few for fusing to pay")
    monkeypatch.setenv("FUSEDHEAD_MIN_LOGITS", "66")
    right(loss, hidden(6, D), weight(), labels(6))


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_a_head_inside_a_function_transform_is_left_with_a_sentence(transform: str) -> None:
    def batched(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return torch.func.vmap(lambda h, y: loss(h, w, y))(h, y)

    def differentiated(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return torch.func.grad(lambda w: loss(h.flatten(0, 1), w, y.flatten()))(w)

    program = {"vmap": batched, "grad": differentiated}[transform]
    left(program, torch.randn(B, T, D), torch.randn(V, D), labels(), because="inside a torch.func transform")


@pytest.mark.parametrize("picked", ["[1]", ".indices", "[-1]"])
def test_the_index_of_the_maximum_alone_is_an_argmax(picked: str) -> None:
    scope: dict[str, Any] = {"F": F}
    exec(
        "def program(h, w, y):\n"
        "    z = F.linear(h, w)\n"
        f"    return F.cross_entropy(z, y), (z.max(-1){picked} == y).float().mean()",
        scope,
    )
    report = right(scope["program"], hidden(6, D), weight(), labels(6))
    assert "argmax" in report.heads[0].computes

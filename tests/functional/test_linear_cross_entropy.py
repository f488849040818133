"""`fusedhead.linear_cross_entropy` on one process, against torch's own functions in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedhead

N, D, V = 24, 16, 96


def given(seed: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> dict[str, Any]:
    torch.manual_seed(seed)
    y = torch.randint(0, V, (N,))
    y[::5] = -100
    results: dict[str, Any] = {
        "input": torch.randn(N, D, dtype=dtype, requires_grad=True),
        "linear_weight": torch.randn(V, D, dtype=dtype, requires_grad=True),
        "target": y,
    }
    if bias:
        results["bias"] = torch.randn(V, dtype=dtype, requires_grad=True)
    return results


def plainly(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    **more: Any,
) -> Tensor:
    """The definition, in torch's words."""
    z = F.linear(input, linear_weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    flat = z.reshape(-1, z.shape[-1])
    loss = F.cross_entropy(flat, target.reshape(-1), reduction=reduction, **more)
    loss = loss.reshape(target.shape) if reduction == "none" else loss
    if not z_loss:
        return loss
    counts = target != more.get("ignore_index", -100)
    square = torch.where(counts, z_loss * z.logsumexp(-1).square(), 0)
    if reduction == "none":
        return loss + square
    return loss + (square.sum() / counts.sum() if reduction == "mean" else square.sum())


def outcome(function: Any, operands: dict[str, Any], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """The loss and all gradients, through an upstream gradient that is not 1."""
    moved = {k: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for k, x in operands.items()}
    if isinstance(options.get("weight"), Tensor):
        options["weight"] = options["weight"].to(dtype)
    loss = function(**moved, **options)
    (loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum().backward()
    return [loss.detach(), *(x.grad for x in moved.values() if x.requires_grad)]


FORMS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "reduction": "none"},
    {"z_loss": 1e-2},
    {"z_loss": 1e-2, "reduction": "sum"},
    {"z_loss": 1e-2, "reduction": "none"},
    {"softcap": 3.0},
    {"ignore_index": 7},
    {"weight": torch.linspace(0.1, 2, V)},
    {"weight": torch.linspace(0.1, 2, V), "label_smoothing": 0.2},
    {"softcap": 5.0, "z_loss": 1e-3, "label_smoothing": 0.05, "weight": torch.linspace(0.1, 2, V)},
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: ",".join(form) or "plain")
def test_loss_and_gradients_are_torchs(form: dict[str, Any], bias: bool) -> None:
    operands = given(3, bias=bias)
    if "ignore_index" in form:
        operands["target"] = operands["target"].clamp(min=0)
    truth = outcome(plainly, operands, torch.float64, **form)
    ours = outcome(fusedhead.linear_cross_entropy, operands, torch.float32, **form)
    eager = outcome(plainly, operands, torch.float32, **form)
    for got, plain, exact in zip(ours, eager, truth, strict=True):
        least = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (got - exact).abs().max() <= max(1.5 * (plain - exact).abs().max(), least)


@pytest.mark.parametrize("memory", ["auto", "min", 3])
def test_any_leading_dimensions_and_any_memory(memory: Any) -> None:
    operands = given(5)
    h, w, y = operands["input"], operands["linear_weight"], operands["target"]
    flat = fusedhead.linear_cross_entropy(h, w, y, reduction="none")
    shaped = fusedhead.linear_cross_entropy(h.view(2, 3, 4, D), w, y.view(2, 3, 4), reduction="none", memory=memory)
    assert shaped.shape == (2, 3, 4)
    torch.testing.assert_close(shaped.flatten(), flat)
    one = fusedhead.linear_cross_entropy(h[1], w, y[1])
    torch.testing.assert_close(one, F.cross_entropy(F.linear(h[1], w), y[1]))


def test_no_logits_are_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.most = max(self.most, out.numel())
            return out

    h, w, y = torch.randn(2048, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True), torch.arange(2048)
    with Largest() as seen:
        fusedhead.linear_cross_entropy(h, w, y).backward()
    assert seen.most < 2048 * 4096 / 4


def test_the_dtype_is_eagers() -> None:
    operands = given(7, torch.bfloat16)
    assert fusedhead.linear_cross_entropy(**operands).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fusedhead.linear_cross_entropy(**given(7))
    assert loss.dtype == torch.float32
    loss.backward()


def test_only_what_requires_a_gradient_gets_one() -> None:
    operands = given(9)
    frozen = operands["linear_weight"].detach()
    fusedhead.linear_cross_entropy(operands["input"], frozen, operands["target"]).backward()
    assert operands["input"].grad is not None
    with torch.no_grad():
        assert not fusedhead.linear_cross_entropy(**operands).requires_grad


def test_all_labels_ignored_is_torchs_nan_without_a_gradient_of_nan() -> None:
    operands = given(11)
    y = torch.full_like(operands["target"], -100)
    loss = fusedhead.linear_cross_entropy(operands["input"], operands["linear_weight"], y)
    loss.backward()
    assert loss.isnan()
    assert operands["input"].grad.count_nonzero() == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_by_any_backend_it_is_the_same(reduction: str) -> None:
    operands = given(13)
    expected = fusedhead.linear_cross_entropy(**operands, reduction=reduction)
    compiled = torch.compile(fusedhead.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    loss = compiled(**operands, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    grad = operands["input"].grad.clone()
    operands["input"].grad = None
    expected.sum().backward()
    torch.testing.assert_close(grad, operands["input"].grad)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reduction": "avg"}, "'avg' is not a valid value for reduction; expected one of 'none', 'mean', 'sum'"),
        ({"label_smoothing": 1.5}, "label_smoothing must be between 0.0 and 1.0. Got: 1.5"),
        ({"softcap": 0.0}, "softcap must be a positive number or None. Got: 0.0"),
        ({"target": torch.rand(N, V)}, "target must hold class indices, torch.int64. Got: torch.float32"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "target must have the shape [24], input's without the last"),
        ({"linear_weight": torch.rand(V, 1)}, "input must be [..., D] and linear_weight [V, D]. Got: input [24, 16]"),
        ({"bias": torch.rand(3)}, "bias must have one number a row of linear_weight, 96. Got: [3]"),
        ({"memory": "least"}, "a positive number of MiB. Got: 'least'"),
    ],
)
def test_what_does_not_fit_together_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        fusedhead.linear_cross_entropy(**(given(15) | change))


@pytest.mark.parametrize("label", [V, -1])
def test_a_label_out_of_range_raises(label: int) -> None:
    operands = given(17)
    operands["target"][3] = label
    with pytest.raises(fusedhead.LabelOutOfRange, match=f"label {label} is out of range"):
        fusedhead.linear_cross_entropy(**operands)


def test_infinite_and_broken_rows_stay_alone() -> None:
    operands = given(19)
    h = operands["input"].detach().clone()
    h[1], h[2] = torch.inf, torch.nan
    plain = plainly(h, operands["linear_weight"], operands["target"], reduction="none")
    ours = fusedhead.linear_cross_entropy(h, operands["linear_weight"], operands["target"], reduction="none")
    torch.testing.assert_close(ours, plain, equal_nan=True)

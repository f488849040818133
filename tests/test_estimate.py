"""`fusedhead.estimate`: heads without a compilation, without memory, and without a trace in what was given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedhead

V, D, N = 50304, 2048, 8192


class Model(nn.Module):
    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D, device=device, dtype=torch.bfloat16)
        self.head = nn.Linear(D, V, bias=False, device=device, dtype=torch.bfloat16)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.embedding(tokens))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def tokens(device: str = "meta") -> Tensor:
    return torch.empty(8, N // 8, dtype=torch.long, device=device)


def test_a_model_on_meta_is_estimated_and_left_as_it_was() -> None:
    model = Model()
    weight = model.head.weight
    step = fusedhead.estimate(model, chip="h100", options={"fusedhead.min_logits": "auto"})(tokens(), tokens())
    (one,) = step.heads
    shifted = 8 * (N // 8 - 1)
    assert (one.head.module, one.head.fused, one.head.tokens) == ("head", True, shifted)
    assert one.bytes_inductor == shifted * V * 2
    assert one.bytes_eager > 5.9 * one.bytes_inductor  # float32 logits, their log-softmax, and two gradients
    assert 0 < one.bytes_fusedhead < one.bytes_inductor
    assert one.milliseconds == pytest.approx(6 * shifted * D * V / 715e12 * 1e3)
    assert "715" not in str(step)
    assert all(len(line) <= 100 for line in str(step).splitlines())
    assert repr(step) == "<fusedhead.StepEstimate: 1 heads on H100 SXM>"
    assert model.head.weight is weight is model.embedding.weight
    assert weight.device.type == "meta"


def test_a_function_that_closes_over_a_model_is_followed_to_where_it_asks_for_a_number() -> None:
    model = Model()

    def step(x: Tensor) -> float:
        loss = model(x, x)
        return loss.item()

    result = fusedhead.estimate(step, chip="h100")(tokens())
    assert [one.head.module for one in result.heads] == ["head"]
    assert "DataDependentOutputException" in result.stopped


def test_a_head_that_the_chip_would_leave_is_left_with_the_reason() -> None:
    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(h @ w.T, y)

    few = torch.empty(16, 64), torch.empty(1000, 64), torch.empty(16, dtype=torch.long)
    (one,) = fusedhead.estimate(loss, chip="h100", options={"fusedhead.min_logits": "auto"})(*few).heads
    assert not one.head.fused
    assert one.head.reason.startswith("its 16,000 logits are too few for fusing to pay")
    assert one.bytes_fusedhead == one.bytes_inductor


def test_a_wrong_call_says_what_was_meant() -> None:
    for name in ("estimate", "explain"):
        function = getattr(fusedhead, name)
        with pytest.raises(TypeError, match=rf"second pair of brackets: fusedhead\.{name}\(fn\)\(\*args\)"):
            function(Model, tokens())
        with pytest.raises(TypeError, match="unexpected argument 'labels'"):
            function(Model, labels=tokens())
    with pytest.raises(ValueError, match="unknown chip 'abacus'; the known ones are h100"):
        fusedhead.estimate(Model, chip="abacus")(tokens())

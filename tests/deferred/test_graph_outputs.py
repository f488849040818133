"""Which outputs of a graph are deferred, and how containers, walkers and options hand them out."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedhead.report.report import Report
from tests.deferred.heads import (
    B,
    Model,
    Operations,
    T,
    V,
    WithLoss,
    compare,
    deferring,
    gradients,
    is_deferred,
    tokens,
)  # fmt: skip


def test_one_token_at_a_time_is_not_deferred(model: Model) -> None:
    """Generation: deferring would only cost."""
    compiled = deferring(model.eval(), dynamic=True)
    with torch.no_grad():
        assert is_deferred(compiled(tokens(4, 32)))
        assert type(compiled(tokens(1, 1))) is Tensor
        assert type(compiled(tokens(2, 2))) is Tensor


def test_greedy_generation_with_the_model_that_trains(model: Model) -> None:
    compiled, x = deferring(model, dynamic=True), tokens()
    F.cross_entropy(compiled(x).view(-1, V), x.view(-1)).backward()

    def generate(run: Any) -> Tensor:
        sequence = x
        with torch.no_grad():
            for _ in range(6):
                sequence = torch.cat([sequence, run(sequence)[:, -1].argmax(-1, keepdim=True)], 1)
        return sequence

    assert torch.equal(generate(compiled), generate(model))


@dataclass
class Output:
    logits: Tensor
    hidden: Any = None


Pair = namedtuple("Pair", "logits hidden")


@pytest.mark.parametrize(
    "container",
    [
        lambda z: Output(z),
        lambda z: {"logits": z},
        lambda z: (z,),
        lambda z: [z, None],
        lambda z: Pair(z, None),
    ],
    ids=["dataclass", "dict", "tuple", "list", "namedtuple"],
)
def test_containers_hand_it_out_as_it_is(container: Any) -> None:
    model, x = Model(container), tokens()
    output = deferring(model)(x)
    z = output.logits if hasattr(output, "logits") else output["logits"] if isinstance(output, dict) else output[0]
    assert is_deferred(z)
    with Operations() as ran:
        F.cross_entropy(z.flatten(0, 1), x.flatten()).backward()
    assert (ran.fused, ran.large) == (["head_loss"], [])


def test_an_output_may_be_replaced_by_its_own_cast() -> None:
    model, x = Model(Output, torch.bfloat16), tokens()
    output = deferring(model)(x)
    output.logits = output.logits.float()
    assert is_deferred(output.logits)
    assert output.logits.dtype == torch.float32
    with Operations() as ran:
        F.cross_entropy(output.logits.view(-1, V), x.view(-1)).backward()
    assert (ran.fused, ran.large) == (["head_loss"], [])


def test_one_graph_may_be_demanded(model: Model) -> None:
    assert is_deferred(deferring(model, fullgraph=True)(tokens()))


class WithHidden(Model):
    def forward(self, x: Tensor) -> dict[str, Any]:
        first = self.embed(x)
        last = torch.tanh(self.mix(first))
        return {"logits": self.lm_head(last), "hidden_states": (first, last)}


def test_hidden_states_may_be_returned_too() -> None:
    model = WithHidden()

    def loss(output: dict[str, Any]) -> Tensor:
        return F.cross_entropy(output["logits"].view(-1, V), X.view(-1)) + output["hidden_states"][1].pow(2).mean()

    ran = compare(model, loss, X)
    assert (ran.fused, ran.large) == (["head_loss"], [])


X = torch.arange(B * T).reshape(B, T)


def test_logits_beside_the_loss_cost_nothing_until_they_are_read() -> None:
    model, x, report = WithLoss(), tokens(), Report()
    wanted = gradients(model, model(x, x)["loss"])
    output = deferring(model, report)(x, x)
    assert is_deferred(output["logits"])
    with Operations() as ran:
        actual = gradients(model, output["loss"])
    assert ran.large == []
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)
    (head,) = report.heads
    assert (head.fused, head.logits) == (True, "deferred")
    assert head.bytes_logits == B * (T - 1) * V * 4
    assert head.bytes_saved == head.bytes_logits - head.workspace_bytes
    torch.testing.assert_close(output["logits"] + 0, model(x)["logits"])
    assert (head.materialised, head.bytes_saved) == (True, 0)


def test_the_report_says_that_a_head_without_a_loss_is_deferred(model: Model) -> None:
    report = Report()
    deferring(model, report)(tokens())
    (head,) = report.heads
    assert (head.fused, head.computes, head.logits, head.vocab_size) == (True, "returned, deferred", "deferred", V)


def test_the_option_switches_it_off(model: Model) -> None:
    report = Report()
    z = deferring(model, report, logits="eager")(tokens())
    assert type(z) is Tensor
    (head,) = report.heads
    assert (head.fused, head.logits, head.vocab_size) == (False, "built", V)
    assert 'fusedhead.logits="eager"' in head.reason
    output = deferring(WithLoss(), report, logits="eager")(tokens(), tokens())
    assert type(output["logits"]) is Tensor


def test_inner_layers_of_a_network_are_left_alone() -> None:
    report = Report()
    layer = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
    assert type(deferring(layer, report)(torch.randn(4, 512))) is Tensor
    assert type(deferring(nn.Linear(512, 2048), report)(torch.randn(4, 512))) is Tensor
    assert report.heads == []


def test_converters_of_outputs_keep_it_deferred() -> None:
    """accelerate turns low-precision outputs into float32 by walking them."""
    model = Model(Output, torch.bfloat16)
    output = deferring(model)(X)

    def convert(data: Any) -> Any:
        if isinstance(data, Tensor) and data.dtype in (torch.float16, torch.bfloat16):
            return data.float()
        return type(data)(**{k: convert(v) for k, v in vars(data).items()}) if isinstance(data, Output) else data

    logits = convert(output).logits
    assert is_deferred(logits)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("setting", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}, {}])
def test_cuda_graphs_are_recognised(setting: dict[str, Any]) -> None:
    from fusedhead.inductor.config import Inductor, overwrites

    inductor = Inductor(setting.get("mode", "default"), setting.get("options"), None)
    assert overwrites(inductor) == bool(setting)


def test_walkers_of_trees_keep_it_deferred(model: Model) -> None:
    from torch.utils._pytree import tree_flatten, tree_map

    output = deferring(model)(X)
    detached = tree_map(lambda t: t.detach(), {"logits": (output, [output])})
    assert all(map(is_deferred, tree_flatten(detached)[0]))

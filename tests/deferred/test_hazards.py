"""What could go wrong with logits that are computed late, one hazard a test."""

from __future__ import annotations

import threading
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import torch.optim.optimizer as optimizers
from torch import Tensor, nn

from fusedhead.deferred.graph_outputs import StaleLogits
from fusedhead.report.report import Report
from tests.deferred.heads import (
    B,
    D,
    Model,
    Operations,
    T,
    V,
    compare,
    deferring,
    gradients,
    is_deferred,
    tokens,
)  # fmt: skip


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.mark.parametrize("foreach", [True, False])
def test_reading_after_the_optimizer_step_is_an_error_with_the_remedy(model: Model, foreach: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    z = deferring(model)(tokens())
    F.cross_entropy(z.view(-1, V), tokens().view(-1)).backward()
    optimizer.step()
    with pytest.raises(StaleLogits, match=r"lm_head.weight.*changed in place.*before optimizer.step\(\)"):
        z.sum()
    with pytest.raises(StaleLogits, match="FUSEDHEAD_LOGITS=eager"):
        F.cross_entropy(z.view(-1, V), tokens().view(-1))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_step_of_a_fused_optimizer_is_noticed_though_it_leaves_no_version_behind(
    model: Model, optimizer: Any
) -> None:
    fused = optimizer([model.lm_head.weight], lr=0.1, fused=True)
    others = optimizer([torch.ones(1)], lr=0.1, fused=True)
    z = deferring(model)(tokens())
    F.cross_entropy(z.view(-1, V), tokens().view(-1)).backward()
    others.step()
    assert is_deferred(z.detach())
    assert z.detach().sum().isfinite()
    again = deferring(model)(tokens())
    fused.step()
    with pytest.raises(StaleLogits, match=r"lm_head.weight.*stepped by an optimizer.*before optimizer.step\(\)"):
        again.sum()


def test_a_step_on_other_names_of_the_weights_memory_is_noticed(model: Model) -> None:
    alias = nn.Parameter(model.lm_head.weight.detach())
    alias.grad = torch.ones_like(alias)
    z = deferring(model)(tokens())
    torch.optim.SGD([alias], lr=0.1, fused=True).step()
    with pytest.raises(StaleLogits, match=r"lm_head.weight.*stepped by an optimizer"):
        z.sum()


def test_noticing_steps_does_not_get_into_compiled_optimizers(model: Model) -> None:
    def breaks() -> dict[str, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        weight = nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        torch.compile(torch.optim.SGD([weight], lr=0.5).step, backend="eager")()
        assert torch.equal(weight, torch.full((3,), 0.5))
        return dict(torch._dynamo.utils.counters["graph_break"])

    deferring(model)(tokens())  # somebody asks from here on
    assert optimizers._global_optimizer_post_hooks
    with_hook = breaks()
    with patch.dict(optimizers._global_optimizer_post_hooks, clear=True):
        assert breaks() == with_hook


def test_logits_that_were_read_before_the_step_stay_readable(model: Model) -> None:
    z = deferring(model)(tokens())
    before = z.sin()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert torch.equal(z.sin(), before)


ASKED = {
    "retain_grad": lambda z, loss: z.retain_grad(),
    "register_hook": lambda z, loss: z.register_hook(lambda g: g * 0),
    "autograd.grad": lambda z, loss: torch.autograd.grad(loss, z),
    "autograd.grad, perhaps unused": lambda z, loss: torch.autograd.grad(loss, inputs=[z], allow_unused=True),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_a_gradient_that_is_asked_for_after_the_loss_is_an_error_with_the_remedy(
    model: Model, asked: Callable[[Tensor, Tensor], Any]
) -> None:
    z = deferring(model)(tokens())
    loss = F.cross_entropy(z.view(-1, V), tokens().view(-1))
    with pytest.raises(RuntimeError, match=r"after a loss was taken.*before the loss.*FUSEDHEAD_LOGITS=eager"):
        asked(z, loss)


def test_a_gradient_that_is_asked_for_before_the_loss_is_that_of_eager_code(model: Model) -> None:
    x, y = tokens(), tokens().view(-1)
    z, expected = deferring(model)(x), model(x)
    for logits in (z, expected):
        with torch.no_grad():
            F.cross_entropy(logits.view(-1, V), y)  # no gradient passes them by
        logits.retain_grad()
        F.cross_entropy(logits.view(-1, V), y).backward()
    torch.testing.assert_close(z.grad, expected.grad)


def test_deferred_logits_of_which_a_loss_was_taken_can_still_be_differentiated_themselves(model: Model) -> None:
    x = tokens()
    z, expected = deferring(model)(x), model(x)
    F.cross_entropy(z.view(-1, V), x.view(-1))
    w, up = model.lm_head.weight, torch.ones(B, T, V)
    (got,), (want,) = (torch.autograd.grad(logits, w, up) for logits in (z, expected))
    torch.testing.assert_close(got, want)


def test_memory_that_was_taken_away_is_never_read(model: Model) -> None:
    z = deferring(model)(tokens())
    model.lm_head.weight.data.untyped_storage().resize_(0)
    with pytest.raises(StaleLogits, match=r"lm_head.weight.*freed or moved"):
        z.sum()


def test_a_weight_that_was_replaced_leaves_the_logits_what_they_were(model: Model) -> None:
    x = tokens()
    z, real = deferring(model)(x), model(x)
    model.lm_head.weight.data = torch.randn(V, D)
    assert torch.equal(z + 0, real)


def halved_without_gradients(z: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(z.view(-1, V), torch.zeros(z.shape[:-1].numel(), dtype=torch.long))
    with torch.no_grad():
        return loss, z / 2


def test_what_is_made_of_them_under_no_grad_in_the_graph_carries_no_gradient() -> None:
    model = Model(halved_without_gradients)
    x = tokens()
    loss, z = deferring(model)(x)
    assert is_deferred(z)
    assert not z.requires_grad
    assert not F.cross_entropy(z.view(-1, V), tokens().view(-1)).requires_grad
    loss.backward()
    torch.testing.assert_close(z + 0, model(x)[1])


def test_the_next_forward_changes_nothing(model: Model) -> None:
    compiled, x, other = deferring(model), tokens(), tokens()
    z = compiled(x)
    later = compiled(other)
    torch.testing.assert_close(z + 0, model(x))
    torch.testing.assert_close(later + 0, model(other))


def test_evaluation_without_gradients(model: Model) -> None:
    compiled, x = deferring(model.eval()), tokens(16, 6)
    with torch.no_grad():
        z = compiled(x)
        loss = F.cross_entropy(z.view(-1, V), x.view(-1))
        assert is_deferred(z)
        torch.testing.assert_close(loss, F.cross_entropy(model(x).view(-1, V), x.view(-1)))
    with torch.inference_mode():
        z = compiled(x)
        torch.testing.assert_close(z.argmax(-1), model(x).argmax(-1))
        torch.testing.assert_close(z + 0, model(x))


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


def test_without_gradients_recorded_in_a_forward_with_them(model: Model) -> None:
    """Metrics on the training logits, under no_grad."""
    x = tokens()
    z, real = deferring(model)(x), model(x)
    with torch.no_grad():
        accuracy = (z.argmax(-1) == x).float().mean()
        entropy = torch.distributions.Categorical(logits=z).entropy()
        scaled = z * 2
    assert accuracy == (real.argmax(-1) == x).float().mean()
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=real.detach()).entropy())
    assert not scaled.requires_grad
    torch.testing.assert_close(gradients(model, z.pow(2).sum()), gradients(model, model(x).pow(2).sum()))


def test_another_thread_may_read_it(model: Model) -> None:
    x = tokens()
    z, real, found = deferring(model)(x), model(x), []

    def read() -> None:
        with torch.no_grad():
            found.append(z + 0)
            found.append(F.cross_entropy(z.view(-1, V), x.view(-1)))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for value in found:
        expected = real if value.ndim else F.cross_entropy(real.view(-1, V), x.view(-1))
        torch.testing.assert_close(value, expected.detach())


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


class WithLoss(Model):
    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        z = super().forward(x)
        loss = None if y is None else F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))
        return {"loss": loss, "logits": z}


def test_logits_beside_the_loss_cost_nothing_until_they_are_read() -> None:
    model, x, report = WithLoss(), tokens(), Report()
    wanted = gradients(model, model(x, x)["loss"])
    output = deferring(model, report)(x, x)
    assert is_deferred(output["logits"])
    with Operations() as ran:
        found = gradients(model, output["loss"])
    assert ran.large == []
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    (head,) = report.heads
    assert (head.fused, head.logits) == (True, "deferred")
    assert head.bytes_logits == B * (T - 1) * V * 4
    assert head.bytes_saved == head.bytes_logits - head.workspace_bytes
    torch.testing.assert_close(output["logits"] + 0, model(x)["logits"])
    assert (head.materialised, head.bytes_saved) == (True, 0)


def test_gradients_through_the_loss_in_the_graph_and_the_logits_outside() -> None:
    model, x = WithLoss(), tokens()

    def total(output: dict[str, Any]) -> Tensor:
        return output["loss"] + (output["logits"] ** 2).mean() + torch.logsumexp(output["logits"], -1).mean()

    wanted = gradients(model, total(model(x, x)))
    found = gradients(model, total(deferring(model)(x, x)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


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


def a_temperature_in_place(z: Tensor) -> Tensor:
    z.div_(0.7)
    return F.cross_entropy(z.view(-1, V), X.view(-1))


def products_in_place(z: Tensor) -> Tensor:
    """torchtune's reverse divergence subtracts one product from another where it stands."""
    p, lp = z.softmax(-1), z.log_softmax(-1)
    product = p * lp
    product -= p * 0.5
    return product.sum(-1).mean()


def one_of_two_in_place(z: Tensor) -> Tensor:
    warm = z * 2
    warm /= 0.7
    return F.cross_entropy(warm.view(-1, V), X.view(-1)) + F.cross_entropy(z.view(-1, V), X.view(-1))


@pytest.mark.parametrize("form", [a_temperature_in_place, products_in_place, one_of_two_in_place])
def test_a_write_to_memory_that_nothing_shares_builds_no_logits(form: Any) -> None:
    assert compare(Model(), form, X).large == []


def in_place_on_a_view(z: Tensor) -> Tensor:
    shifted = z[:, :-1][:, -3:]
    shifted.div_(0.7)
    return F.cross_entropy(shifted.reshape(-1, V), X[:, :3].reshape(-1)) + z.pow(2).mean()


def a_copy_before_the_write(z: Tensor) -> Tensor:
    doubled, view = z * 2, z.view(-1, V)
    z[:, :, 7] = -1.0
    return F.cross_entropy(view, X.view(-1)) + doubled.pow(2).mean()


def a_result_before_the_write(z: Tensor) -> Tensor:
    doubled = z * 2
    z.div_(0.7)
    return F.cross_entropy(z.view(-1, V), X.view(-1)) + torch.logsumexp(doubled, -1).mean()


def augmented_assignment(z: Tensor) -> Tensor:
    rows = z.view(-1, V)
    rows *= 0.5
    return F.cross_entropy(rows, X.view(-1)) + z.sum() * 1e-3


def used_as_a_tensor_after_the_write(z: Tensor) -> Tensor:
    z.mul_(0.5)
    return F.cross_entropy(z.view(-1, V), X.view(-1)) + torch.sin(z).mean()


def backward_of_another_function(z: Tensor) -> Tensor:
    z.mul_(0.5)
    return F.cross_entropy(Reversed.apply(z).view(-1, V), X.view(-1))


@pytest.mark.parametrize(
    "form",
    [
        in_place_on_a_view, a_copy_before_the_write, a_result_before_the_write, augmented_assignment,
        used_as_a_tensor_after_the_write, backward_of_another_function,
    ],
)  # fmt: skip
def test_writes_reach_everything_that_shares_the_memory(form: Any) -> None:
    compare(Model(), form, X)


def test_two_names_of_one_tensor_see_a_write(model: Model) -> None:
    z, real = deferring(model)(X), model(X)
    same = z
    z /= 0.7
    assert same is z
    torch.testing.assert_close(same + 0, real / 0.7)
    with torch.no_grad():
        z.mul_(2)  # without a gradient: what stands for the tensor is not changed behind autograd's back
    torch.testing.assert_close(same + 0, real / 0.35)


def test_an_operand_written_to_later_was_read_when_it_was_given(model: Model) -> None:
    temperature = torch.full((B, T, 1), 0.5)
    z, real = deferring(model)(X) / temperature, model(X) / temperature
    temperature.zero_()
    torch.testing.assert_close(torch.logsumexp(z, -1), torch.logsumexp(real, -1))
    torch.testing.assert_close(z + 0, real)


def test_a_gradient_of_the_logits_themselves_may_be_kept(model: Model) -> None:
    z, real = deferring(model)(X), model(X)
    for logits in (z, real):
        logits.retain_grad()
        F.cross_entropy(logits.view(-1, V), X.view(-1)).backward()
    torch.testing.assert_close(z.grad, real.grad)


def test_a_detached_leaf_of_the_logits_has_its_own_gradient(model: Model) -> None:
    z, real = deferring(model)(X), model(X)
    found = []
    for logits in (z, real):
        leaf = logits.detach().requires_grad_()
        F.cross_entropy(leaf.view(-1, V), X.view(-1)).backward()
        found.append(gradients_of_backward(model, logits, leaf.grad))
    torch.testing.assert_close(found[0], found[1])


def gradients_of_backward(model: nn.Module, logits: Tensor, grad: Tensor) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    logits.backward(grad)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_autograd_walkers_find_the_parameters_behind_it(model: Model) -> None:
    """DDP with find_unused_parameters walks grad_fn of every tensor in the output."""
    from torch.nn.parallel.distributed import _find_tensors

    z = deferring(model)(X)
    (found,) = _find_tensors({"logits": [z]})
    seen, stack, leaves = set(), [found.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(following for following, _ in node.next_functions)
    assert {id(p) for p in leaves} == {id(p) for p in model.parameters()}
    assert is_deferred(z)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Model()
        wanted = gradients(model, F.cross_entropy(model(X).view(-1, V), X.view(-1)))
        wrapped = nn.parallel.DistributedDataParallel(deferring(model), find_unused_parameters=True)
        z = wrapped(X)
        found = gradients(model, F.cross_entropy(z.view(-1, V), X.view(-1)))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def test_a_gradient_that_another_function_defines_counts(model: Model) -> None:
    compare(model, lambda z: F.cross_entropy(Reversed.apply(z).view(-1, V), X.view(-1)), X)


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


def test_hidden_states_in_memory_that_is_used_again_are_copied(model: Model) -> None:
    """CUDA graphs hand out the same memory at every run."""
    from fusedhead.deferred.graph_outputs import deferring as finishing
    from fusedhead.graph.recipes import Recipe

    recipes: list[tuple[Recipe, Any]] = []

    def compile_with_static_memory(gm: Any, inputs: Any) -> Any:
        from fusedhead.backend import run_pass
        from fusedhead.options import Options

        working, _, wrap = run_pass(gm, Options(logits="deferred", min_logits=0))
        finish = finishing(0, True)
        return wrap(working.forward, lambda r, s: recipes.append((r, s)) or finish(r, s))

    z = torch.compile(model, backend=compile_with_static_memory)(X)
    expected = model(X).detach()
    ((_, sources),) = recipes
    with torch.no_grad():
        next(s for s in sources if s.shape == (B, T, D)).fill_(float("nan"))
    torch.testing.assert_close(z.detach() + 0, expected)


@pytest.mark.parametrize("setting", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}, {}])
def test_cuda_graphs_are_recognised(setting: dict[str, Any]) -> None:
    from fusedhead.inductor.config import Inductor, overwrites

    inductor = Inductor(setting.get("mode", "default"), setting.get("options"), None)
    assert overwrites(inductor) == bool(setting)


def test_deferred_logits_of_two_forwards_may_meet(model: Model) -> None:
    compiled, other = deferring(model), X.flip(0)
    z, w = compiled(X), compiled(other)
    torch.testing.assert_close(
        F.kl_div(F.log_softmax(z, -1), F.log_softmax(w, -1), log_target=True, reduction="sum"),
        F.kl_div(F.log_softmax(model(X), -1), F.log_softmax(model(other), -1), log_target=True, reduction="sum"),
    )
    assert torch.cat([compiled(X), compiled(other)]).shape == (2 * B, T, V)


def test_data_parallel_hands_it_on(model: Model) -> None:
    z = nn.DataParallel(deferring(model))(X)
    assert is_deferred(z)
    wanted = gradients(model, F.cross_entropy(model(X).view(-1, V), X.view(-1)))
    torch.testing.assert_close(
        gradients(model, F.cross_entropy(z.view(-1, V), X.view(-1))), wanted, rtol=1e-4, atol=1e-6
    )


def test_walkers_of_trees_keep_it_deferred(model: Model) -> None:
    from torch.utils._pytree import tree_flatten, tree_map

    output = deferring(model)(X)
    detached = tree_map(lambda t: t.detach(), {"logits": (output, [output])})
    assert all(map(is_deferred, tree_flatten(detached)[0]))


def test_collectives_get_numbers(model: Model, tmp_path: Any) -> None:
    """What accelerate does to gather metrics: the memory of the tensor is read past Python."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run, real, into = deferring(model), model(X).detach(), [torch.zeros(B, T, V)]
        torch.distributed.all_gather(into, run(X).detach().contiguous())
        assert torch.equal(into[0], real)
        reduced = run(X).detach()
        torch.distributed.all_reduce(reduced)
        assert torch.equal(reduced + 0, real)
    finally:
        torch.distributed.destroy_process_group()

"""A deferred tensor stands for what eager code made at the same moment: its numbers, its history, its modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fusedhead.deferred.graph_outputs import StaleLogits
from tests.deferred.heads import Model, Operations, T, V, deferring, is_deferred, tokens
from tests.eager_stack import backend

ROWS = 16  # times T: enough tokens for logits without gradients to be deferred
Y = torch.randint(0, V, (ROWS, T), generator=torch.Generator().manual_seed(1))

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda z: F.cross_entropy(z.flatten(0, 1), Y.flatten()),
    "log_softmax and gather": lambda z: z.log_softmax(-1).gather(-1, Y[..., None]).mean(),
    "logsumexp": lambda z: z.logsumexp(-1).mean(),
    "entropy": lambda z: torch.distributions.Categorical(logits=z).entropy().mean(),
    "the numbers": lambda z: z.sin().mean(),
}


def same(run: Callable[[Callable[..., Any], Model], Tensor]) -> Any:
    """``run(forward, model)`` with the model itself and deferred: the values and all gradients, or the errors."""
    torch.manual_seed(0)
    model, x = Model(), tokens(ROWS)
    compiled = deferring(model)
    found = []
    for forward in (model, compiled):
        model.requires_grad_(True)
        model.zero_grad()
        try:
            loss = run(lambda forward=forward: forward(x), model)
        except Exception as error:
            found.append((type(error), str(error)))
            continue
        if loss.requires_grad:
            model.requires_grad_(True)
            loss.backward()
        found.append((loss.detach(), loss.requires_grad, loss.is_inference(), [p.grad for p in model.parameters()]))
    expected, got = found
    if isinstance(expected[0], type):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    return expected


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_made_without_gradients_have_none(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.no_grad():
            z = forward()
        return LOSSES[loss](z)

    assert same(run)[1] is False


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_switched_on_again_do_not_bring_them_back(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.no_grad():
            z = forward()
            with torch.enable_grad():
                return LOSSES[loss](z)

    assert same(run)[1] is False


@pytest.mark.parametrize("loss", LOSSES)
def test_a_forward_with_gradients_inside_of_no_grad_has_them(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.no_grad(), torch.enable_grad():
            z = forward()
        return LOSSES[loss](z)

    assert same(run)[1] is True


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("at_first", [False, True])
def test_a_head_is_as_frozen_as_it_was_at_the_forward(loss: str, at_first: bool) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        model.lm_head.requires_grad_(at_first)
        z = forward()
        model.lm_head.requires_grad_(not at_first)
        return LOSSES[loss](z)

    assert (same(run)[3][-1] is not None) == at_first


@pytest.mark.parametrize("loss", LOSSES)
def test_a_head_that_is_frozen_at_the_backward_gets_no_gradient(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        value = LOSSES[loss](forward())
        model.lm_head.requires_grad_(False)
        value.backward()
        return value.detach()

    assert same(run)[3][-1] is None


def test_a_divergence_from_logits_of_the_same_weights_made_without_gradients() -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.no_grad():
            before = forward() * 0.5
        return F.kl_div(forward().log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean")

    same(run)


def test_a_ratio_to_log_probabilities_of_the_same_weights() -> None:
    def log_probability(z: Tensor) -> Tensor:
        return z.log_softmax(-1).gather(-1, Y[..., None])

    def run(forward: Any, model: Model) -> Tensor:
        with torch.no_grad():
            old = forward()
        return -(log_probability(forward()) - log_probability(old)).exp().mean()

    same(run)


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_made_in_inference_mode_may_be_read_outside(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.inference_mode():
            z = forward()
        assert z.is_inference()
        return LOSSES[loss](z)

    assert same(run)[1] is False


@pytest.mark.parametrize("loss", LOSSES)
def test_a_metric_in_inference_mode_is_an_inference_tensor(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        z = forward()
        value = LOSSES[loss](z)
        with torch.inference_mode():
            return LOSSES[loss](z) + value.detach()

    same(run)


@pytest.mark.parametrize("use", [
    lambda z, w: F.kl_div((w @ w.T).log_softmax(-1)[:1], z.flatten(0, 1)[:1, :V].softmax(-1)),
    lambda z, w: (z * w.sum()).logsumexp(-1).mean(),
    lambda z, w: F.cross_entropy(z.flatten(0, 1) * w.mean(), Y.flatten()),
])  # fmt: skip
def test_logits_made_in_inference_mode_cannot_be_differentiated_around(use: Any) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.inference_mode():
            z = forward()
        return use(z, model.lm_head.weight)

    same(run)


def test_a_student_of_a_teacher_in_inference_mode_is_eager_codes_error() -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.inference_mode():
            teacher = forward().softmax(-1)
        return F.kl_div(forward().log_softmax(-1), teacher, reduction="batchmean")

    assert same(run)[0] is RuntimeError


REGIONS: dict[str, Callable[[Tensor], Any]] = {
    **LOSSES,
    "two statistics": lambda z: z.logsumexp(-1).mean() + LOSSES["entropy"](z),
    "a statistic and the numbers": lambda z: z.logsumexp(-1).mean() + z.sin().mean(),
    "steps that save what they make": lambda z: (z.exp() + z.tanh() * z.sigmoid()).mean(),
    "chunks": lambda z: sum(c.logsumexp(-1).mean() for c in z.chunk(3, 1)),
    "chunks and the whole": lambda z: sum(c.logsumexp(-1).mean() for c in z.chunk(3, 1)) + z.logsumexp(-1).mean(),
}


def save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.sin.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


SURROUNDINGS: dict[str, Callable[[Any, Any], Any]] = {
    "checkpoint": lambda f, *a: checkpoint(f, *a, use_reentrant=False),
    "reentrant checkpoint": lambda f, *a: checkpoint(f, *a, use_reentrant=True),
    "selective checkpoint": lambda f, *a: checkpoint(
        f, *a, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(save_products)
    ),
    "checkpoint in a checkpoint": lambda f, *a: checkpoint(
        lambda *b: checkpoint(f, *b, use_reentrant=False), *a, use_reentrant=False
    ),
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("region", REGIONS)
def test_logits_first_read_in_a_region_that_is_run_twice(surrounding: str, region: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        z = forward()
        value = SURROUNDINGS[surrounding](REGIONS[region], z)
        return value + z.pow(2).mean()  # numbers that exist by the second run

    same(run)


def test_a_model_and_its_loss_in_one_region_stay_fused() -> None:
    model, x = Model(), tokens(ROWS)
    compiled, ran = deferring(model), []

    def region(t: Tensor) -> Tensor:
        z = compiled(t)
        with Operations(ROWS * T) as these:
            ran.append(these)
            return LOSSES["cross_entropy"](z)

    checkpoint(region, x, use_reentrant=False).backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    LOSSES["cross_entropy"](model(x)).backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)
    assert [(these.fused, these.large) for these in ran] == [(["head_loss"], [])] * 2


@pytest.mark.parametrize("loss", LOSSES)
def test_hooks_on_saved_tensors_get_what_is_saved_and_give_it_back(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        z = forward()
        with torch.autograd.graph.save_on_cpu():
            value = LOSSES[loss](z)
        return value + z.cos().mean()

    same(run)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_read_among_stand_ins_leaves_none_behind(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        z = forward()
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(LOSSES[loss](z), FakeTensor)
            assert isinstance(z.sin(), FakeTensor)
        return LOSSES[loss](z) + z.sin().mean()

    same(run)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, z: torch.func.grad(f)(z).pow(2).sum(),
    "grad of a factor": lambda f, z: torch.func.grad(lambda s: f(z * s))(torch.ones(())),
    "vmap": lambda f, z: torch.func.vmap(lambda s: z.logsumexp(-1) * s)(torch.ones(3)).sum() + f(z),
    "vmap over it": lambda f, z: torch.func.vmap(lambda row: row.logsumexp(-1))(z).sum(),
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (torch.ones_like(z),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_function_transforms_see_numbers_and_leave_none_of_theirs_behind(transform: str, loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        z = forward()
        return TRANSFORMS[transform](LOSSES[loss], z) + LOSSES[loss](z) + z.sin().mean()

    same(run)


@pytest.mark.parametrize("compiler", ["pass", "eager", "aot_eager"])
@pytest.mark.parametrize("written", ["weight", "hidden states"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_stale_logits_are_an_error_in_every_compiled_function(compiler: str, written: str) -> None:
    """At the call that compiles, and at those that find the graph."""
    run = deferring(lambda h, w: h @ w.T)
    with_pass = backend(lambda report: None)
    loss = torch.compile(LOSSES["cross_entropy"], backend=with_pass if compiler == "pass" else compiler)
    for stale in (True, True, False, True, False):
        h, w = torch.randn(ROWS, T, 8), torch.randn(V, 8)
        z, expected = run(h, w), LOSSES["cross_entropy"](h @ w.T)
        assert is_deferred(z)
        if stale:
            (w if written == "weight" else h).mul_(0.5)
            with pytest.raises(StaleLogits, match="changed in place"):
                loss(z)
        else:
            torch.testing.assert_close(loss(z), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("compiler", ["pass", "aot_eager"])
def test_a_compiled_loss_gives_the_gradients_that_its_logits_have(compiler: str) -> None:
    model, x = Model(), tokens(ROWS)
    run, with_pass = deferring(model), backend(lambda report: None)
    loss = torch.compile(LOSSES["cross_entropy"], backend=with_pass if compiler == "pass" else compiler)
    for frozen in (True, False, True):
        found = []
        for forward, f in ((model, LOSSES["cross_entropy"]), (run, loss)):
            model.zero_grad()
            model.lm_head.requires_grad_(not frozen)
            z = forward(x)
            model.lm_head.requires_grad_(frozen)
            value = f(z)
            model.lm_head.requires_grad_(True)
            value.backward()
            found.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


class Lion(torch.optim.Optimizer):
    """An optimizer of another package, which writes through ``.data``."""

    def __init__(self, parameters: Any, ungraded: bool = False) -> None:
        super().__init__(parameters, {})
        self.ungraded = ungraded

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.sign(), alpha=-0.1)
                elif self.ungraded:
                    p.data.add_(torch.randn(p.shape) * 0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "Adafactor": torch.optim.Adafactor,
    "another's": Lion,
}


def accuracy(z: Tensor) -> Tensor:
    return (z.argmax(-1) == Y).float().mean() + z.detach().sum()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_does_not_write_the_head_leaves_its_logits_readable(optimizer: str) -> None:
    def frozen(forward: Any, model: Model) -> Tensor:
        model.lm_head.requires_grad_(False)
        step = OPTIMIZERS[optimizer](model.parameters())
        z = forward()
        LOSSES["cross_entropy"](z).backward()
        step.step()
        return accuracy(z)

    def without_gradients(forward: Any, model: Model) -> Tensor:
        other = nn.Parameter(torch.ones(2))
        step = OPTIMIZERS[optimizer]([*model.parameters(), other])
        z = forward()
        other.grad = torch.ones(2)
        step.step()
        return LOSSES["cross_entropy"](z) + accuracy(z)

    for run in (frozen, without_gradients):
        found = []
        for deferred in (False, True):
            torch.manual_seed(0)
            model, x = Model(), tokens(ROWS)
            forward = deferring(model) if deferred else model
            found.append(run(lambda f=forward, x=x: f(x), model).detach())
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_writes_the_head_is_noticed(optimizer: str) -> None:
    model, x = Model(), tokens(ROWS)
    run, step = deferring(model), OPTIMIZERS[optimizer](model.parameters())
    z = run(x)
    LOSSES["cross_entropy"](z).backward()
    step.step()
    with pytest.raises(StaleLogits):
        accuracy(z)
    step.zero_grad()
    z = run(x)
    step.step(lambda: LOSSES["cross_entropy"](model(x)).backward())
    with pytest.raises(StaleLogits):
        accuracy(z)


def test_a_write_without_a_gradient_by_anothers_optimizer_is_noticed() -> None:
    model, x = Model(), tokens(ROWS)
    run, step = deferring(model), Lion(model.lm_head.parameters(), ungraded=True)
    z = run(x)
    step.step()
    with pytest.raises(StaleLogits, match="stepped by an optimizer"):
        accuracy(z)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_fused_step_writes_unless_it_found_infinities(found: float) -> None:
    model, x = Model(), tokens(ROWS)
    run, step = deferring(model), torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    z, expected = run(x), accuracy(model(x))
    LOSSES["cross_entropy"](z).backward()
    step.grad_scale, step.found_inf = torch.ones(()), torch.tensor(found)
    step.step()
    if found:
        torch.testing.assert_close(accuracy(z), expected)
        step.found_inf = torch.zeros(())
        step.step()
    with pytest.raises(StaleLogits, match="stepped by an optimizer"):
        accuracy(z * 1)


@pytest.mark.parametrize("write", [lambda w: w.data.mul_(0.9), lambda w: w.detach().numpy().fill(0.5)])
def test_a_write_that_leaves_no_version_is_noticed_on_the_cpu(write: Any) -> None:
    model, x = Model(), tokens(ROWS)
    z = deferring(model)(x)
    write(model.lm_head.weight)
    with pytest.raises(StaleLogits, match=r"lm_head.weight.*through .data or by its memory"):
        z.sin()


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def overwritten(z: Tensor) -> Tensor:
    view = z.view(-1, V)
    z[..., 3] = 0.5
    view[0] = 1.0
    return z


@pytest.mark.parametrize("before", [
    overwritten,
    lambda z: z.detach().requires_grad_() * 1 + z,
    lambda z: overwritten(z * 2),
    lambda z: overwritten(z).detach_().requires_grad_() + z[0, 0, 0],
    lambda z: z.sin().sum() + z,
])  # fmt: skip
def test_an_autograd_function_gets_the_history_after_a_write(before: Any) -> None:
    """It asks the tensor in C++, past everything that stands for it."""
    same(lambda forward, model: Tripled.apply(before(forward())).pow(2).mean())


def test_an_autograd_function_of_a_leaf_of_the_logits_gives_it_its_gradient() -> None:
    model, x = Model(), tokens(ROWS)
    found = []
    for forward in (model, deferring(model)):
        leaf = forward(x).detach().requires_grad_()
        Tripled.apply(leaf).pow(2).mean().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "viewed": lambda z: z.view(-1, V),
    "sliced": lambda z: z[:, 1:],
    "chunk": lambda z: z.chunk(2)[1],
    "detached": lambda z: z.detach(),
    "data": lambda z: z.data,
    "scaled": lambda z: z * 2,
    "viewed and scaled": lambda z: z.view(-1, V) * 2,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_made_without_gradients_says_of_itself_what_eager_codes_says(view: str, mode: Any) -> None:
    model, x = Model(), tokens(ROWS)
    found = []
    for forward in (model, deferring(model)):
        z = forward(x)
        with mode():
            v = VIEWS[view](z)
            best = v.argmax(-1)
        loss = v.logsumexp(-1).mean() if not v.is_inference() else None
        own = loss is not None and loss.requires_grad
        if own:
            loss.backward()
        found.append((v.requires_grad, v.is_leaf, v.is_inference(), best, loss, v.grad if own else None))
        found[-1] += tuple(p.grad for p in model.parameters())
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_view_of_logits_that_were_written_to_enters_a_compiled_function() -> None:
    compiled = torch.compile(LOSSES["cross_entropy"], backend=backend(lambda report: None))
    model, x = Model(), tokens(ROWS)
    values = []
    for forward, loss in ((model, LOSSES["cross_entropy"]), (deferring(model), compiled)):
        z = forward(x)
        view = z.view(ROWS, T, V)
        z.index_fill_(-1, torch.tensor([3]), -2.0)
        values.append(loss(view).detach())
    torch.testing.assert_close(values[1], values[0])

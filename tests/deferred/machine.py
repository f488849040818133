"""Two copies of one program, one of whose models returns deferred logits: each step is done to both and compared.

A `World` holds a pool of pairs of tensors, the real one and the deferred one. An action is a function of one side and
of tensors of that side; the tables say what it is tried on. Compared are values, gradients, errors, and what a tensor
says of itself. Numbers of deferred tensors are compared when an action reads them, and at the end: to compare is to
read. It must not know hypothesis.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fusedhead.deferred.graph_outputs import DeferredLogits, StaleLogits, plain
from tests.deferred.heads import D, V, deferring, is_deferred
from tests.eager_stack import backend

B, T = 11, 6  # enough tokens for logits without gradients to be deferred
POOL = 10
# what is told of each step, as it begins; the variable: print it, for a program that ends the process
watchers: list[Callable[[str], None]] = []
if os.environ.get("FUSEDHEAD_MACHINE_TRACE"):
    watchers.append(lambda step: print(step, file=sys.stderr, flush=True))


class Net(nn.Module):
    """[B, T] tokens to logits in one of some forms, with a learned scale that a caller may use."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=form == "bias")
        if form == "tied":
            self.lm_head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(V))

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.mix(self.embed(x)))
        z = self.lm_head(h)
        if self.form == "capped":
            return 5 * torch.tanh(z / 5)
        if self.form == "two":
            with torch.no_grad():
                half = z / 2
            return z, half
        return (h, z) if self.form == "with hidden states" else z


FORMS = ("plain", "bias", "tied", "capped", "two", "with hidden states")


@dataclass(eq=False)
class Side:
    """One of the two programs."""

    model: Net
    forward: Callable[[Tensor], Any]
    tokens: Tensor
    labels: Tensor
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)


@dataclass(eq=False)
class Pair:
    real: Tensor
    other: Tensor
    made_of: frozenset[int] = frozenset()  # forwards that it comes from
    coarse: bool = False  # whether some of it was computed in half precision


# what a tensor says of itself; of a part of what was written to, asking may be an error
LOOKS: dict[str, Callable[[Tensor], Any]] = {
    **{name: lambda t, name=name: getattr(t, name) for name in ("shape", "dtype", "requires_grad", "is_leaf")},
    "is_inference": lambda t: t.is_inference(),
    "strides": lambda t: t.stride(),
    "whether there is no grad_fn": lambda t: t.grad_fn is None,
}

# errors of eager code at what need not be one: a checkpoint that finds a parameter frozen since
EAGER_ALONE = ("during the original forward and recomputation",)
# a part of what was written to, where C++ uses it (autograd functions, torch.func): the numbers of what is deferred are
# right, and a backward raises the error
LATE = "is a view and its base or another view of its base has been modified inplace"


class Difference(AssertionError):
    """What a deferred tensor did that the tensor it stands for does not."""


@cache
def compiled(form: str) -> tuple[Net, Net, dict[str, Tensor], Any]:
    """The models of a form, what they start from, and the second one compiled: once a process."""
    torch.manual_seed(0)
    real = Net(form)
    other = copy.deepcopy(real)
    return real, other, {k: v.clone() for k, v in real.state_dict().items()}, deferring(other)


def cross_entropy(z: Tensor, y: Tensor, **how: Any) -> Tensor:
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1)[: z.numel() // z.shape[-1]], **how)


def entropy(z: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=z).entropy()


@cache
def loss_compiled_by(compiler: str) -> Callable[[Tensor, Tensor], Tensor]:
    by = backend(lambda report: None) if compiler == "pass" else compiler
    return torch.compile(cross_entropy, backend=by)


@cache
def step_with_a_break() -> Callable[[Tensor], Tensor]:
    def step(z: Tensor) -> Tensor:
        z = z / 0.7
        torch._dynamo.graph_break()
        return z - z.logsumexp(-1, keepdim=True)

    return torch.compile(step, backend=backend(lambda report: None))


def pickled(z: Tensor) -> Tensor:
    stored = io.BytesIO()
    torch.save(z, stored)
    stored.seek(0)
    return torch.load(stored) + pickle.loads(pickle.dumps(z))


class Sub(Tensor):
    pass


def hooked(z: Tensor) -> Tensor:
    _ = z.grad_fn  # register_hook on a view whose base was written to since ends the process, also in eager code
    z.register_hook(lambda grad: grad * 0.5)
    return z


def kept(z: Tensor) -> Tensor:
    z.retain_grad()
    return z


# [.., V] to the like
STEPS: dict[str, Callable[[Side, Tensor], Any]] = {
    "flattened": lambda s, z: z.reshape(-1, z.shape[-1]),
    "viewed": lambda s, z: z.view(-1, z.shape[-1]),
    "shifted": lambda s, z: z[:-1],
    "one": lambda s, z: z[0],
    "tokens": lambda s, z: z[..., 1:, :] if z.ndim > 1 else z,
    "masked": lambda s, z: z[(s.tokens if z.ndim == 3 else s.tokens.flatten())[: z.shape[0]] % 2 == 0],
    "transposed": lambda s, z: z.transpose(0, 1) if z.ndim > 2 else z,
    "chunks": lambda s, z: z.chunk(2, 0),
    "split": lambda s, z: z.split(3, 0),
    "temperature": lambda s, z: z / 0.7,
    "scaled": lambda s, z: z * s.model.scale,
    "shifted by class": lambda s, z: z + s.model.shift,
    "masked classes": lambda s, z: z.masked_fill(torch.arange(z.shape[-1]) > 1000, -30.0),
    "float": lambda s, z: z.float(),
    "bfloat16": lambda s, z: z.bfloat16(),
    "clone": lambda s, z: z.clone(),
    "contiguous": lambda s, z: z.contiguous(),
    "detach": lambda s, z: z.detach(),
    "data": lambda s, z: z.data,
    "log_softmax": lambda s, z: z.log_softmax(-1),
    "softmax": lambda s, z: z.softmax(-1),
    "tanh": lambda s, z: z.tanh(),
    "exp": lambda s, z: (z * 0.1).exp(),
    "unsqueezed": lambda s, z: z.unsqueeze(0).squeeze(0),
    "hooked": lambda s, z: hooked(z),
    "its gradient kept": lambda s, z: kept(z),
    "a leaf of it": lambda s, z: z.detach().requires_grad_(),
    "copied": lambda s, z: copy.deepcopy(z),
    "copied, detached": lambda s, z: copy.deepcopy(z.detach()),
    "copied, shallow": lambda s, z: copy.copy(z),
    "pickled": lambda s, z: pickled(z.detach()),
    "a parameter": lambda s, z: nn.Parameter(z.detach().clone()),
    "of a subclass": lambda s, z: z.as_subclass(Sub).as_subclass(Tensor),
    "another class and back": lambda s, z: torch.as_tensor(z.detach().numpy()),
    "through a graph break": lambda s, z: step_with_a_break()(z),
    "written": lambda s, z: z.mul_(0.5),
    "a class written": lambda s, z: z.index_fill_(-1, torch.tensor([3]), -2.0),
    "filled": lambda s, z: z.masked_fill_(torch.arange(z.shape[-1]) == 7, 0.5),
    "a copy written": lambda s, z: z.clone().div_(0.7),
    "the gradient switched": lambda s, z: z.requires_grad_(),
    "the numbers": lambda s, z: (z * 0.3).sin(),
    "rolled": lambda s, z: z.roll(1, 0),
    "summed in order": lambda s, z: z.cumsum(-1) * 0.01,
    "stacked": lambda s, z: torch.stack([z, z * 2])[1],
}  # fmt: skip

# [.., V] to a few numbers
STATISTICS: dict[str, Callable[[Side, Tensor], Any]] = {
    "cross_entropy": lambda s, z: cross_entropy(z, s.labels),
    "sum of losses": lambda s, z: cross_entropy(z, s.labels, reduction="sum", ignore_index=5),
    "losses": lambda s, z: cross_entropy(z, s.labels, reduction="none"),
    "smoothed": lambda s, z: cross_entropy(z, s.labels, label_smoothing=0.1),
    "weighted": lambda s, z: cross_entropy(z, s.labels, weight=torch.linspace(0.5, 1.5, z.shape[-1], dtype=z.dtype)),
    "a label too large": lambda s, z: cross_entropy(z, s.labels + 2000),
    "log-probabilities": lambda s, z: z.log_softmax(-1).reshape(-1, z.shape[-1])[:5].gather(-1, s.labels[0, :5, None]),
    "nll_loss": lambda s, z: F.nll_loss(z.reshape(-1, z.shape[-1]).log_softmax(-1)[:4], s.labels[0, :4]),
    "logsumexp": lambda s, z: z.logsumexp(-1),
    "z-loss": lambda s, z: z.logsumexp(-1).pow(2).mean(),
    "entropy": lambda s, z: entropy(z),
    "argmax": lambda s, z: z.argmax(-1),
    "largest": lambda s, z: z.max(-1).values,
    "topk": lambda s, z: z.topk(3, -1).values,
    "mean": lambda s, z: z.mean(),
    "squares": lambda s, z: z.pow(2).mean(-1),
    "variance": lambda s, z: z.var(-1),
    "an item": lambda s, z: z.reshape(-1)[5].item(),
    "a list": lambda s, z: z.reshape(-1, z.shape[-1])[0].tolist(),
    "compiled loss": lambda s, z: loss_compiled_by("pass")(z, s.labels),
    "loss compiled by another": lambda s, z: loss_compiled_by("aot_eager")(z, s.labels),
    "gradient of a function": lambda s, z: torch.func.grad(lambda t: t.logsumexp(-1).mean())(z).pow(2).sum(),
    "vmap": lambda s, z: torch.func.vmap(lambda t: z.logsumexp(-1) * t)(torch.ones(2)),
    "vmap over it": lambda s, z: torch.func.vmap(lambda row: row.logsumexp(-1))(z),
    "its gradient": lambda s, z: torch.autograd.grad(z.logsumexp(-1).mean(), z, retain_graph=True)[0].sum(-1),
    "what it is": lambda s, z: str((z.is_contiguous(), z.stride(), z.storage_offset(), z._version)),
}  # fmt: skip

# two of one shape
MEETINGS: dict[str, Callable[[Side, Tensor, Tensor], Any]] = {
    "KL": lambda s, z, w: F.kl_div(z.log_softmax(-1), w.log_softmax(-1), log_target=True, reduction="batchmean"),
    "KL to probabilities": lambda s, z, w: F.kl_div(z.log_softmax(-1), w.softmax(-1), reduction="sum"),
    "ratio": lambda s, z, w: (z.log_softmax(-1)[..., 3] - w.log_softmax(-1)[..., 3]).exp().mean(),
    "difference": lambda s, z, w: z - w,
    "distance": lambda s, z, w: F.mse_loss(z, w),
    "mixture": lambda s, z, w: torch.logaddexp(z.log_softmax(-1), w.log_softmax(-1)).logsumexp(-1),
    "together": lambda s, z, w: torch.cat([z, w]),
    "copied into": lambda s, z, w: z.copy_(w),
    "losses together": lambda s, z, w: cross_entropy(z, s.labels) + cross_entropy(w, s.labels),
}


def in_a_thread(run: Callable[..., Any], *tensors: Tensor) -> Any:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append((True, run(*tensors)))
        except Exception as error:
            found.append((False, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    fine, value = found[0]
    if not fine:
        raise value
    return value


def within(*modes: Callable[[], Any]) -> Callable[..., Any]:
    def run_in(run: Callable[..., Any], *tensors: Tensor) -> Any:
        if len(modes) == 1:
            with modes[0]():
                return run(*tensors)
        with modes[0](), modes[1]():
            return run(*tensors)

    return run_in


def counting(*_: Any, **__: Any) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
    return op in (torch.ops.aten.mm.default, torch.ops.aten.exp.default, torch.ops.aten.sin.default)


def selective() -> Any:
    return create_selective_checkpoint_contexts(save_products)


# ways to run a function of tensors
MODES: dict[str, Callable[..., Any]] = {
    "": lambda run, *t: run(*t),
    "no_grad": within(torch.no_grad),
    "enable_grad": within(torch.enable_grad),
    "enable_grad in no_grad": within(torch.no_grad, torch.enable_grad),
    "inference_mode": within(torch.inference_mode),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "checkpoint": lambda run, *t: checkpoint(run, *t, use_reentrant=False),
    "reentrant checkpoint": lambda run, *t: checkpoint(run, *t, use_reentrant=True),
    "selective checkpoint": lambda run, *t: checkpoint(run, *t, use_reentrant=False, context_fn=selective),
    "save_on_cpu": within(torch.autograd.graph.save_on_cpu),
    "counted": within(counting),
    "thread": in_a_thread,
}  # fmt: skip

# a function that is first called under a dispatch mode is never compiled again
COMPILES = ("compiled loss", "loss compiled by another", "through a graph break")
UNCOMPILED = ("counted", "selective checkpoint")

# eps: a gradient that is nothing but rounding must not become a step of its own
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, fused=True),
}


@torch.no_grad()
def replaced(side: Side) -> None:
    side.model.lm_head.weight.data = side.model.lm_head.weight * 0.9


def written(name: str, side: Side) -> None:
    target = {"weight": side.model.lm_head.weight, "trunk": side.model.mix.weight, "scale": side.model.scale}[name]
    with torch.no_grad():
        target.mul_(0.9)


CHANGES: dict[str, Callable[[Side], Any]] = {
    "head frozen": lambda s: s.model.lm_head.requires_grad_(False) and None,
    "head unfrozen": lambda s: s.model.lm_head.requires_grad_(True) and None,
    "trunk frozen": lambda s: s.model.mix.requires_grad_(False) and None,
    "all unfrozen": lambda s: s.model.requires_grad_(True) and None,
    "weight written": lambda s: written("weight", s),
    "weight replaced": lambda s: replaced(s),
    "weight written through .data": lambda s: s.model.lm_head.weight.data.mul_(0.9) is None,
    "trunk written": lambda s: written("trunk", s),
    "scale written": lambda s: written("scale", s),
    "labels written": lambda s: s.labels.add_(1).remainder_(V) is None,
    "tokens written": lambda s: s.tokens.add_(1).remainder_(V) is None,
    "gradients cleared": lambda s: s.model.zero_grad(),
    **{f"{name} steps": lambda s, name=name: s.optimizers[name].step() and None for name in OPTIMIZERS},
}


def numbers(tensor: Tensor) -> Tensor:
    return plain(tensor).detach().clone() if isinstance(tensor, DeferredLogits) else tensor.detach().clone()


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (list, tuple)) else []


def close_frames(error: BaseException) -> None:
    """End what an error has left suspended: `checkpoint` of torch 2.11 is a generator that keeps its hooks and modes.

    They would hold for whatever runs next, until the traceback goes, and then be taken off from under those of others.
    """
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__


def written_since(tensor: Tensor, version: int, value: Tensor | None) -> bool:
    now = 0 if tensor.is_inference() else tensor._version
    return now != version or (value is not None and not torch.equal(tensor, value))


class World:
    """Both programs, side by side."""

    def __init__(self, form: str) -> None:
        real, other, start, run = compiled(form)
        for model in (real, other):
            model.requires_grad_(True)
            model.zero_grad()
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    value.copy_(start[name])
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randint(0, V, (B, T), generator=generator) for _ in range(2))
        self.sides = (Side(real, real, x.clone(), y.clone()), Side(other, run, x.clone(), y.clone()))
        for side in self.sides:
            side.optimizers = {name: make(side.model.parameters()) for name, make in OPTIMIZERS.items()}
        self.pairs: list[Pair] = []
        self.forwards: list[list[tuple[Tensor, int, Tensor | None]]] = []  # operands, their versions and values
        self.steps: list[str] = []
        self.deferred = self.waiting = self.stale = 0
        self.unseen: set[int] = set()  # forwards whose weight was written to in a way that leaves no trace
        self.recomputed: set[int] = set()  # forwards that checkpointing makes again in a backward
        self.coarse_gradients = self.coarse_weights = False  # whether some were computed in half precision

    def written(self, pairs: Sequence[Pair]) -> bool:
        """Whether something that the pairs are made of was written since."""
        operands = [o for pair in pairs for at in pair.made_of for o in self.forwards[at]]
        return any(written_since(*operand) for operand in operands)

    def forward(self, mode: str) -> None:
        mode = "" if mode in UNCOMPILED else mode
        self.say(f"forward in {mode!r}")
        before = list(self.pairs)
        self.both(lambda s: s.forward(s.tokens), [], mode, runs_forward=True)
        new = [pair for pair in self.pairs if pair not in before]
        if not new:
            return
        model = self.sides[0].model
        hidden = [pair.real for pair in new if pair.real.shape[-1] == D]
        made_of = [model.lm_head.weight, *([model.lm_head.bias] if model.lm_head.bias is not None else []), *hidden]
        self.forwards.append([(t, 0 if t.is_inference() else t._version, t.detach().clone()) for t in made_of])
        if "checkpoint" in mode:
            self.recomputed.add(len(self.forwards) - 1)
        for pair in new:
            pair.made_of |= {len(self.forwards) - 1}

    def act(self, kind: str, name: str, picks: Sequence[int], mode: str) -> None:
        table: dict[str, Callable[..., Any]] = {"step": STEPS, "statistic": STATISTICS, "meeting": MEETINGS}[kind]
        wide = [pair for pair in self.pairs if pair.real.ndim and pair.real.shape[-1] == V]
        if not wide:
            return
        chosen = [wide[pick % len(wide)] for pick in picks[: 2 if kind == "meeting" else 1]]
        if kind == "meeting" and chosen[0].real.shape != chosen[1].real.shape:
            return
        mode = "" if mode in UNCOMPILED and name in COMPILES else mode
        self.say(f"{name} of {[self.pairs.index(pair) for pair in chosen]} in {mode!r}")
        self.both(table[name], chosen, mode)

    def change(self, name: str) -> None:
        self.say(name)
        self.coarse_gradients &= name != "gradients cleared"
        self.coarse_weights |= self.coarse_gradients and name.endswith(" steps")
        if name == "weight written through .data":  # no version says so: eager code's gradients mix both weights
            self.unseen |= set(range(len(self.forwards)))
        if name in ("trunk written", "tokens written") or (name.endswith(" steps") and self.stepping()):
            self.unseen |= self.recomputed  # eager code's gradients mix both forwards, and ours mix them elsewhere
        if name == "weight replaced":  # what was made of the old memory stays as it is; versions are counted on
            weight = self.sides[0].model.lm_head.weight
            self.forwards = [
                [(t, -1 if written_since(*operand) else version, None) if t is weight else operand
                 for operand in each for t, version, _ in [operand]] for each in self.forwards
            ]  # fmt: skip
        if name == "fused AdamW steps" and self.sides[0].model.lm_head.weight.grad is not None:
            weight = self.sides[0].model.lm_head.weight  # in its new memory: no version says so, and steps are counted
            self.forwards = [
                [(t, -1 if t is weight and value is None else version, value) for t, version, value in each]
                for each in self.forwards
            ]
        for side in self.sides:
            CHANGES[name](side)

    def stepping(self) -> bool:
        """Whether a step of an optimizer writes to the trunk."""
        return any(p.grad is not None for p in (self.sides[0].model.mix.weight, self.sides[0].model.embed.weight))

    def write_to(self, pick: int) -> None:
        """A write to a small result, or to hidden states."""
        small = [pair for pair in self.pairs if not (pair.real.ndim and pair.real.shape[-1] == V)]
        if small:
            pair = small[pick % len(small)]
            self.say(f"write to {self.pairs.index(pair)}")
            self.both(lambda s, t: t.mul_(2), [pair], "")

    def backward(self, pick: int) -> None:
        able = [pair for pair in self.pairs if pair.real.requires_grad and not pair.made_of & self.unseen]
        if not able:
            return
        pair = able[pick % len(able)]
        self.say(f"backward of {self.pairs.index(pair)}")
        both = (pair.real, pair.other)
        outcomes = [self.outcome(lambda t=t: t.float().mean().backward(retain_graph=True)) for t in both]
        if self.errors(outcomes, [pair], backward=True):
            self.forget([pair])
            for side in self.sides:  # part of it may have arrived
                side.model.zero_grad()
            return
        self.coarse_gradients |= pair.coarse
        self.gradients(pair.coarse)

    # how it is compared

    def both(self, action: Callable[..., Any], chosen: Sequence[Pair], mode: str, runs_forward: bool = False) -> None:
        outcomes = []
        for side, tensors in zip(self.sides, ([p.real for p in chosen], [p.other for p in chosen])):
            run = (lambda _, side=side: action(side)) if runs_forward else (lambda *t, side=side: action(side, *t))
            given = [side.tokens] if runs_forward else tensors
            outcomes.append(self.outcome(lambda run=run, given=given: MODES[mode](run, *given)))
        if self.errors(outcomes, chosen):
            self.forget(chosen)
            return
        expected, found = (value for _, value in outcomes)
        coarse = mode == "autocast" or self.coarse_weights or any(pair.coarse for pair in chosen)
        reals, others = tensors_of(expected), tensors_of(found)
        self.check(len(reals) == len(others), f"{len(others)} results for {len(reals)}")
        if not reals:
            return self.same_numbers(found, expected, coarse)
        made_of = frozenset().union(*(pair.made_of for pair in chosen)) if chosen else frozenset()
        for real, other in zip(reals, others):
            known = next((pair for pair in self.pairs if pair.real is real), None)
            if known is not None:
                self.check(known.other is other, "eager code hands the same tensor back, this another")
            pair = known or Pair(real, other, made_of, coarse or real.dtype in (torch.bfloat16, torch.float16))
            pair.coarse |= coarse
            self.looks(pair)
            if known is None:
                self.pairs.append(pair)
                self.deferred += is_deferred(other)
            if not is_deferred(other):
                self.same_numbers(other, real, pair.coarse)
        del self.pairs[: max(0, len(self.pairs) - POOL)]

    def outcome(self, run: Callable[[], Any]) -> tuple[bool, Any]:
        try:
            return True, run()
        except Exception as error:
            close_frames(error)
            return False, error

    def errors(self, outcomes: Sequence[tuple[bool, Any]], chosen: Sequence[Pair], backward: bool = False) -> bool:
        """Whether there was an error; what it must not be is a difference."""
        (fine, expected), (fine_too, found) = outcomes
        if fine_too and fine:
            return False
        if not fine_too:
            if isinstance(found, StaleLogits) and self.written(chosen):
                self.stale += 1
                return True
            if isinstance(found, RuntimeError) and "is asked for after a loss was taken" in str(found):
                # eager code may have a hook now: nothing that reaches it is compared
                self.forget([p for p in self.pairs if any(p.made_of & pair.made_of for pair in chosen)])
                return True
        # what a backward needs and finds written may be needed by one of the two formulas alone
        if backward and (not fine or not fine_too):
            error = found if fine else expected
            if "modified by an inplace operation" in str(error) or isinstance(error, StaleLogits):
                self.check(self.changed(), f"{error} though nothing was written")
                return True
        if fine_too and any(sentence in str(expected) for sentence in EAGER_ALONE):
            return True
        if fine_too and LATE in str(expected):
            for tensor in tensors_of(found):
                if tensor.requires_grad and not tensor.is_leaf:
                    late = self.outcome(lambda t=tensor: t.float().sum().backward())
                    self.check(LATE in str(late[1]), f"no error in a backward, where eager code gives {expected}")
            return True
        if fine or fine_too or not isinstance(found, type(expected)):
            said = "no error" if fine else f"{type(expected).__name__}: {expected}"
            mine = "no error" if fine_too else f"{type(found).__name__}: {found}"
            error = None if fine_too else found
            raise Difference(f"{mine}, where eager code gives {said}\n{self}") from error
        return True

    def changed(self) -> bool:
        return any(word in step for step in self.steps for word in ("writ", "steps", "filled", "copied into"))

    def forget(self, chosen: Sequence[Pair]) -> None:
        self.pairs = [pair for pair in self.pairs if pair not in chosen]

    def looks(self, pair: Pair) -> None:
        for name, look in LOOKS.items():
            outcomes = [self.outcome(lambda t=t, look=look: look(t)) for t in (pair.real, pair.other)]
            if not self.errors(outcomes, [pair]):
                (_, real), (_, other) = outcomes
                self.check(real == other, f"{name} is {other}, not {real}")

    def same_numbers(self, found: Any, expected: Any, coarse: bool) -> None:
        limits = {"rtol": 5e-2, "atol": 5e-2} if coarse else {"rtol": 2e-4, "atol": 2e-5}
        integers = isinstance(expected, Tensor) and not expected.is_floating_point()
        if (coarse and integers) or isinstance(expected, str) or expected is None:
            self.check(isinstance(expected, Tensor) or found == expected, f"{found}, not {expected}")
            return
        try:
            with torch.no_grad():
                if isinstance(found, Tensor):
                    found, expected = numbers(found), numbers(expected)
                torch.testing.assert_close(found, expected, equal_nan=True, check_stride=False, **limits)
        except AssertionError as error:
            raise Difference(f"{error}\n{self}") from None

    def gradients(self, coarse: bool) -> None:
        pairs = zip(self.sides[0].model.named_parameters(), self.sides[1].model.parameters())
        for (name, real), other in pairs:
            self.check((real.grad is None) == (other.grad is None), f"one {name} has a gradient, the other has none")
            if real.grad is not None:
                size = float(real.grad.abs().max()) or 1.0
                coarse = coarse or self.coarse_gradients or any(pair.coarse for pair in self.pairs)
                limit = (0.1 if coarse else 2e-3) * size + 1e-6
                error = float((real.grad - other.grad).abs().max())
                fine = error <= limit or not real.grad.isfinite().all()
                self.check(bool(fine), f"the gradient of {name} is off by {error}")
        for pair in self.pairs:
            both = (pair.real, pair.other)
            own = [self.outcome(lambda t=t: t.grad if t.retains_grad or t.is_leaf else None) for t in both]
            if self.errors(own, [pair]):
                continue
            real, other = (value for _, value in own)
            self.check((real is None) == (other is None), "one tensor has a gradient of its own")
            if real is not None:
                self.same_numbers(other, real, pair.coarse)

    def end(self) -> None:
        """Read everything."""
        for pair in self.pairs:
            if not pair.other.is_floating_point() and pair.coarse:
                continue
            self.waiting += is_deferred(pair.other)
            outcomes = [self.outcome(lambda t=t: numbers(t)) for t in (pair.real, pair.other)]
            if not self.errors(outcomes, [pair]):
                self.same_numbers(outcomes[1][1], outcomes[0][1], pair.coarse)
        self.gradients(False)

    def check(self, holds: bool, sentence: str) -> None:
        if not holds:
            raise Difference(f"{sentence}\n{self}")

    def say(self, step: str) -> None:
        self.steps.append(step)
        for watcher in watchers:
            watcher(step)

    def __str__(self) -> str:
        return "\n".join([f"form {self.sides[0].model.form!r}", *self.steps])


@contextmanager
def room_for_variants() -> Iterator[None]:
    """Dynamo compiles a graph anew for each grad mode, dtype and set of frozen parameters."""
    donation = torch._functorch.config.patch(donated_buffer=False)  # else torch refuses a second backward
    with donation, torch._dynamo.config.patch(recompile_limit=500, accumulated_recompile_limit=5000):
        yield

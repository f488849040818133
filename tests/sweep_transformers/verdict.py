"""One model class: built tiny, trained one step eagerly, in float64 and compiled, and what came of it.

`Verdict.kind` is one of `KINDS`. A head is looked for without the pass's help: a cross-entropy over the vocabulary's
extent in a program that also makes a linear product of that extent. Errors follow the rule of the fuzzer: ours
against a float64 truth is at most eager's plus a slack. This file handles one class in the process it runs in.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fusedhead import Report
from fusedhead.backend import compile_with
from fusedhead.graph.nodes import name_of
from fusedhead.graph.op_names import PROJECTIONS
from tests.eager_stack import as_it_is, backend
from tests.sweep_transformers.batches import batch
from tests.sweep_transformers.configs import VOCAB, of_class

KINDS = {
    "fused": "every head of the loss is fused, and the loss and all gradients agree",
    "partly fused": "some of its heads are fused",
    "refused": "its head is left alone, with a reason",
    "differs": "the loss or a gradient breaks the error rule",
    "fails": "it compiles under the reference and not under fusedhead",
    "reference fails": "it does not compile under the reference either",
    "not traced": "Dynamo leaves its head to eager code, whatever the backend",
    "no head": "its loss is no cross-entropy over a linear head",
    "no loss": "its forward returns no loss for labels",
    "not built": "no tiny one could be built or run eagerly",
    "stopped": "it took longer than the limit",
}
RECORDED = ("fused", "reason", "where", "computes", "engine", "logits")
LARGEST = 40_000_000  # parameters
ULPS = 64  # units in the last place of float32, of the largest entry, that a compiled model may add to eager's error
SPREAD = 0.2  # standard deviation that the vocabulary's weights have at least, so that probabilities are not flat
UNKNOWN = 4  # times the slack where a model does not run in float64, so that eager's own error is unknown
QUIET = 1e-2  # entries this far below the largest gradient of the model are held to its scale, not their own


@dataclass
class Verdict:
    name: str
    kind: str
    detail: str = ""
    heads: list[dict[str, Any]] = field(default_factory=list)
    losses: int = 0  # cross-entropies over the vocabulary that eager code computes
    nodes: int = 0  # of the graphs that the pass read
    graphs: int = 0
    pass_ms: float = 0.0
    seconds: float = 0.0
    worst: str = ""  # the quantity with the largest error over what is allowed
    worst_ratio: float = 0.0
    note: str = ""
    stack: str = ""  # what the rewritten graphs were handed to; of several runs, all of them


class Watch(TorchFunctionMode):
    """Counts cross-entropies over the vocabulary, and linear products that make it, in eager code."""

    def __init__(self) -> None:
        self.losses = self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("cross_entropy", "nll_loss") and args and isinstance(args[0], Tensor):
            self.losses += VOCAB in args[0].shape[1:]
        if name in ("linear", "matmul", "__matmul__", "mm", "addmm", "bmm", "einsum") and isinstance(result, Tensor):
            self.products += result.ndim > 0 and result.shape[-1] > 0 and result.shape[-1] % VOCAB == 0
        return result


@dataclass
class Step:
    """A training step's results, by name."""

    tensors: dict[str, Tensor]


def step(model: nn.Module, run: Callable[..., Any], inputs: dict[str, Any]) -> Step | None:
    """Forward and backward; None where there is no loss."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    loss = getattr(run(**inputs), "loss", None)
    if loss is None or not isinstance(loss, Tensor) or not loss.requires_grad:
        return None
    loss = loss.sum()
    loss.backward()
    tensors = {"loss": loss.detach().clone()}
    tensors |= {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(tensors)


def built(name: str) -> nn.Module:
    """The tiny model in float32, in training mode with dropout off, its vocabulary's weights scaled to matter."""
    import transformers

    cls = getattr(transformers, name)
    config = of_class(cls)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"the smallest that the rules make has {size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = cls(config).float().train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    with torch.no_grad():
        for p in {id(p): p for p in model.parameters()}.values():
            if p.ndim == 2 and p.shape[0] == VOCAB:
                p.mul_(max(1.0, SPREAD / max(p.std().item(), 1e-3)))
    return model


def doubled(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def makes_logits(gm: GraphModule) -> bool:
    """Whether a graph holds a linear product of the vocabulary's extent."""
    result = (n.meta.get("example_value") for n in gm.graph.nodes if name_of(n) in PROJECTIONS)
    return any(isinstance(z, Tensor) and z.ndim and z.shape[-1] and z.shape[-1] % VOCAB == 0 for z in result)


def compiled(model: nn.Module, stack: str, report: Report, counted: list[int], seen: list[bool]) -> Callable[..., Any]:
    """The model under fusedhead: "eager" runs rewritten graphs as they are, "aot" and "inductor" hand them on.

    ``counted`` and ``seen`` get the number of nodes of every graph, and whether it makes logits.
    """
    options: dict[str, Any] = {"fusedhead.logits": "deferred", "fusedhead.min_logits": 0}
    if stack == "inductor":

        def compile_one(gm: Any, example_inputs: Any) -> Any:
            counted.append(len(gm.graph.nodes))
            seen.append(makes_logits(gm))
            return compile_with(gm, example_inputs, options=options, observe=report.extend)

        return torch.compile(model, backend=compile_one)
    ours = backend(report.extend, reference(stack), **options)

    def rewrite(gm: Any, example_inputs: Any) -> Any:
        counted.append(len(gm.graph.nodes))
        seen.append(makes_logits(gm))
        return ours(gm, example_inputs)

    return torch.compile(model, backend=rewrite)


def reference(stack: str) -> Any:
    if stack == "eager":
        return as_it_is
    return torch._dynamo.lookup_backend("aot_eager" if stack == "aot" else "inductor")


def judge(name: str, stack: str = "eager") -> Verdict:
    """The verdict on the transformers class called ``name``. Never raises."""
    began = time.perf_counter()
    for logger in ("fusedhead", "torch._dynamo", "torch._subclasses.fake_tensor", "torch.fx", "transformers"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = judged(name, stack)
    result.seconds, result.stack = round(time.perf_counter() - began, 2), stack
    return result


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def judged(name: str, stack: str) -> Verdict:
    watch = Watch()
    try:
        model = built(name)
        inputs = batch(model, name)
        with watch:
            eager = step(model, model, inputs)
    except Exception as error:
        return Verdict(name, "not built", one_line(error))
    if eager is None:
        return Verdict(name, "no loss", "takes no labels" if "labels" not in inputs else "")
    report = Report()
    counted: list[int] = []
    seen: list[bool] = []
    verdict = Verdict(name, "no head" if not (watch.losses and watch.products) else "", losses=watch.losses)
    torch.compiler.reset()
    try:
        ours = step(model, compiled(model, stack, report, counted, seen), inputs)
    except Exception as error:
        torch.compiler.reset()
        try:
            step(model, torch.compile(model, backend="eager" if stack == "eager" else reference(stack)), inputs)
        except Exception as theirs:
            verdict.kind, verdict.detail = "reference fails", one_line(theirs)
            return verdict
        verdict.kind, verdict.detail = "fails", one_line(error)
        return verdict
    verdict.heads = [
        {k: v for k, v in asdict(h).items() if k in RECORDED}
        for h in report.heads
        if h.vocab_size % VOCAB == 0  # a router that takes a log-softmax of its projection is no head
    ]
    verdict.graphs, verdict.nodes, verdict.pass_ms = len(counted), sum(counted), round(report.milliseconds, 1)
    if report.errors:
        verdict.kind, verdict.detail = "fails", "the pass raised: " + report.errors[0]
        return verdict
    assert ours is not None
    wrong = compare(verdict, ours, eager, truth_of(model, inputs))
    if wrong:  # is it tracing that changes the numbers, whatever the backend?
        torch.compiler.reset()
        traced = step(model, torch.compile(model, backend=reference(stack)), inputs)
        torch.compiler.reset()
        if traced is None or not compare(Verdict(name, ""), traced, eager, truth_of(model, inputs)):
            verdict.kind, verdict.detail = "differs", wrong
            return verdict
        verdict.worst, verdict.worst_ratio = "", 0.0
        wrong = compare(verdict, ours, traced, truth_of(model, inputs, stack))
        verdict.kind, verdict.detail = "differs" if wrong else verdict.kind, wrong
        verdict.note = "tracing alone changes its numbers: held against the traced model"
    if verdict.kind == "":
        classify(verdict, any(seen))
    return verdict


def truth_of(model: nn.Module, inputs: dict[str, Any], traced_by: str = "") -> Step | None:
    """The step in float64, if the model can take it and gives numbers."""
    try:
        twin = copy.deepcopy(model).double()
        if hasattr(twin, "set_experts_implementation"):
            twin.set_experts_implementation("eager")  # grouped products are of float32 at most
        run = torch.compile(twin, backend=reference(traced_by)) if traced_by else twin
        truth = step(twin, run, tree_map(doubled, inputs))
    except Exception:
        return None
    # a model may hold constants of float32, so that in float64 it masks with numbers that are no longer the smallest
    return truth if truth and all(bool(t.isfinite().all()) for t in truth.tensors.values()) else None


def classify(verdict: Verdict, seen: bool) -> None:
    """What became of a model that has a head and whose numbers are right; ``seen``: in a graph of Dynamo's."""
    fused = [h for h in verdict.heads if h["fused"]]
    left = [h for h in verdict.heads if not h["fused"]]
    if fused and not left:
        verdict.kind = "fused"
    elif fused:
        verdict.kind, verdict.detail = "partly fused", left[0]["reason"]
    elif left or seen:
        verdict.kind = "refused"
        verdict.detail = left[0]["reason"] if left else "no projection was seen before the loss"
    else:
        verdict.kind = "not traced"


def compare(verdict: Verdict, ours: Step, eager: Step, truth: Step | None) -> str:
    """Hold every tensor against the truth, and note the worst: "" where all are right, else what is wrong."""
    odd = ours.tensors.keys() ^ eager.tensors.keys()  # AOTAutograd makes zeros where eager code has no gradient
    if any((ours.tensors | eager.tensors)[name].count_nonzero() for name in odd):
        return f"gradients present on one side only: {', '.join(sorted(odd)[:3])}"
    factor = 1 if truth else UNKNOWN
    true_tensors = (truth or eager).tensors
    floor = QUIET * max(
        (t.abs().max().item() for n, t in true_tensors.items() if n != "loss" and t.numel()), default=1.0
    )
    wrong = ""
    for name, theirs in eager.tensors.items():
        if name in odd:
            continue
        got, true = ours.tensors[name], true_tensors.get(name, theirs).double()
        if not theirs.numel():
            continue
        if not torch.equal(got.isfinite(), theirs.isfinite()):
            return f"{name} is not finite where eager code is, or the reverse"
        if not bool(theirs.isfinite().all()):
            continue
        size = max(true.abs().max().item(), floor, 1e-12)
        far, near = (got.double() - true).abs().max().item(), (theirs.double() - true).abs().max().item()
        allowed = near + factor * ULPS * torch.finfo(torch.float32).eps * size
        if far / allowed > verdict.worst_ratio:
            verdict.worst, verdict.worst_ratio = name, round(far / allowed, 3)
        if far > allowed:
            wrong = f"{name}: error {far:.3g}, eager's {near:.3g}, allowed {allowed:.3g}, size {size:.3g}"
    return wrong

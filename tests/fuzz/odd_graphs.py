"""Random graphs of PyTorch calls around a projection, drawn call by call: odd dtypes, sizes, dimensions, near misses.

Unlike the grammar's programs they mean nothing; a call that fake tensors refuse is drawn again. Every node carries the
fake value that Dynamo would have recorded.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import map_arg
from torch.testing._internal.two_tensor import TwoTensor

B, T, D, V = 2, 3, 4, 11
ROWS = [(B * T,), (B, T), (), (0,), (1,), (1, B, T)]
WEIGHTS = [(V, D), (V, D), (V, D), (D, V), (2, V, D), (V,), (0, D)]
DTYPES = [torch.float32] * 12 + [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.complex64, torch.bool]
WRITES = ["mul_", "add_", "div_", "copy_", "clamp_", "zero_", "exp_", "masked_fill_"]
UNARY = ["exp", "tanh", "sigmoid", "relu", "neg", "abs", "square", "float", "double", "half", "bool", "contiguous",
         "detach", "clone", "t", "squeeze", "item", "conj", "log", "sqrt", "isnan", "numel", "size", "dim"]  # fmt: skip
ALONG = ["softmax", "log_softmax", "logsumexp", "sum", "mean", "amax", "max", "argmax", "cumsum", "sort", "std",
         "unbind", "unsqueeze", "squeeze", "flip", "argsort", "prod", "all", "size"]  # fmt: skip
BINARY = [torch.mul, torch.add, torch.sub, torch.div, torch.maximum, torch.pow, torch.eq, torch.lt, torch.matmul,
          operator.truediv, operator.matmul, operator.imul, operator.iadd, operator.itruediv]  # fmt: skip


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of random numbers."""
    if dtype in (torch.int64, torch.bool):
        return torch.randint(0, 2 if dtype == torch.bool else 3, shape).to(dtype)
    return torch.randn(shape).to(dtype)


class Draft:
    """A graph that grows by random calls; ``inputs`` are real tensors for its placeholders."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.graph, self.inputs = rng, Graph(), list[Tensor]()
        self.symbols = rng.random() < 0.25
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.nodes: list[Node] = []
        self.recorded, self.cast = True, False

    def given(self, tensor: Tensor, learns: bool = False) -> Node:
        if learns and (tensor.is_floating_point() or tensor.is_complex()):
            tensor.requires_grad_()
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        context = None
        if self.symbols and tensor.ndim and type(tensor) is Tensor and tensor.layout is torch.strided:
            first = DimDynamic.DYNAMIC if tensor.shape[0] not in (V, D) else DimDynamic.STATIC
            context = StatelessSymbolicContext([first] + [DimDynamic.STATIC] * (tensor.ndim - 1))
        source = ConstantSource(f"x{len(self.inputs)}") if context else None
        node.meta["example_value"] = self.mode.from_tensor(
            tensor, static_shapes=context is None, source=source, symbolic_context=context
        )
        self.inputs.append(tensor)
        self.nodes.append(node)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node | None:
        """The call as a node, if fake tensors allow it."""
        inputs, named = map_arg((args, kwargs), lambda n: n.meta["example_value"])
        run: Callable[..., Any] = getattr(inputs[0], target, None) if isinstance(target, str) else target
        try:
            with ExitStack() as stack:
                stack.enter_context(self.mode)
                stack.enter_context(torch.set_grad_enabled(self.recorded))
                stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=self.cast))
                result = run(*(inputs[1:] if isinstance(target, str) else inputs), **named)
        except Exception:
            return None
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, args, kwargs)
        node.meta["example_value"] = result
        self.nodes.append(node)
        return node

    def tensors(self) -> list[Node]:
        return [n for n in self.nodes if isinstance(n.meta["example_value"], Tensor)]

    def tensor(self) -> Node:
        """A tensor, likelier one that comes from a product."""
        result = self.tensors()
        outcome = [n for n in result if n.op != "placeholder"]
        return self.rng.choice(outcome[-3:]) if outcome and self.rng.random() < 0.8 else self.rng.choice(result)

    def mask(self) -> Node:
        return self.rng.choice([n for n in self.tensors() if n.meta["example_value"].dtype == torch.bool])

    def labels(self, like: Node) -> Node:
        shape = like.meta["example_value"].shape
        known = [n for n in self.tensors() if n.meta["example_value"].dtype == torch.int64]
        if known and self.rng.random() < 0.7:
            return self.rng.choice(known)
        return self.given_late(torch.randint(0, V, tuple(int(s) for s in shape[:-1])))

    def given_late(self, tensor: Tensor) -> Node:
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.given(tensor)
        self.inputs.insert(0, self.inputs.pop())
        return node


def index(draft: Draft, x: Node) -> Any:
    rng = draft.rng
    entries: list[Any] = [slice(None), slice(None, -1), slice(1, None), 0, -1, None, ..., slice(None, None, 2)]
    entries += [n for n in draft.tensors() if n.meta["example_value"].dtype in (torch.int64, torch.bool)]
    chosen = tuple(rng.choice(entries) for _ in range(rng.randrange(1, 4)))
    return chosen[0] if len(chosen) == 1 else chosen


def shape_for(draft: Draft, x: Node) -> list[Any]:
    rng, sizes = draft.rng, list(x.meta["example_value"].shape)
    if len(sizes) > 1 and rng.random() < 0.7:
        return [-1, sizes[-1]]
    rng.shuffle(sizes)
    return [int(s) if not draft.symbols else s for s in sizes] if rng.random() < 0.5 else [-1]


def loss(draft: Draft) -> Node | None:
    rng, x = draft.rng, draft.tensor()
    value = x.meta["example_value"]
    if value.ndim > 2 and rng.random() < 0.6:
        x = draft.call("reshape", x, -1, value.shape[-1] if isinstance(value.shape[-1], int) else V) or x
    y = draft.labels(x)
    choice = rng.randrange(7)
    reduction = rng.choice(["mean", "sum", "none"])
    if choice < 3:
        options = {"reduction": reduction}
        options |= {"label_smoothing": 0.1} if rng.random() < 0.2 else {}
        options |= {"ignore_index": rng.choice([-1, 0, V])} if rng.random() < 0.3 else {}
        return draft.call(F.cross_entropy, x, y, **options)
    lp = draft.call("log_softmax", x, rng.choice([-1, -1, 0, 1]))
    if lp is None:
        return None
    if choice == 3:
        return draft.call(F.nll_loss, lp, y, reduction=reduction)
    if choice == 4:
        return draft.call("gather", lp, rng.choice([-1, -1, 0, 1]), draft.call("unsqueeze", y, -1) or y)
    if choice == 5:
        return draft.call(F.kl_div, lp, draft.tensor(), reduction=rng.choice(["sum", "none", "batchmean"]))
    return draft.call("sum", draft.call(torch.mul, draft.call("exp", lp) or lp, lp) or lp, -1)


def step(draft: Draft) -> Node | None:
    """One more random call."""
    rng, x = draft.rng, draft.tensor()
    dim = rng.choice([-1, -1, -1, 0, 1, -2, 2])
    choice = rng.random()
    if choice < 0.2:
        return draft.call(rng.choice(BINARY), x, rng.choice([draft.tensor(), 2, 0.5, -1, 0]))
    if choice < 0.32:
        return draft.call(rng.choice(UNARY), x)
    if choice < 0.45:
        return draft.call(rng.choice(ALONG), x, dim)
    if choice < 0.55:
        return draft.call(rng.choice(["view", "reshape", "expand"]), x, *shape_for(draft, x))
    if choice < 0.62:
        return draft.call(operator.getitem, x, index(draft, x))
    if choice < 0.68:
        return draft.call(rng.choice(["transpose", "movedim", "flatten"]), x, dim, rng.choice([0, 1, -1]))
    if choice < 0.74:
        name = rng.choice(WRITES)
        extra = {"copy_": (draft.tensor(),), "clamp_": (-1, 1), "masked_fill_": (draft.mask(), 0.5)}
        return draft.call(name, x, *extra.get(name, () if name in ("zero_", "exp_") else (rng.choice([2, 0.5]),)))
    if choice < 0.78:
        return draft.call(operator.setitem, x, index(draft, x), rng.choice([0, 1.5, draft.tensor()]))
    if choice < 0.83:
        joined = [x, draft.tensor()]
        return draft.call(rng.choice([torch.cat, torch.stack]), joined, dim)
    if choice < 0.87:
        return draft.call(torch.where, draft.mask(), x, rng.choice([draft.tensor(), 0.0]))
    if choice < 0.9:
        return draft.call("gather", x, dim, draft.tensor())
    if choice < 0.93:
        parts = draft.call(rng.choice(["split", "chunk"]), x, rng.choice([1, 2, 4]), dim)
        return parts and draft.call(operator.getitem, parts, 0)
    if choice < 0.95:
        return draft.call("to", x, rng.choice(DTYPES))
    if choice < 0.97:
        return toggle(draft)
    return project(draft)


def toggle(draft: Draft) -> None:
    if draft.rng.random() < 0.5:
        draft.recorded = not draft.recorded
        node = draft.graph.call_function(torch._C._set_grad_enabled, (draft.recorded,))
        node.meta["example_value"] = None


def project(draft: Draft) -> Node | None:
    rng, result = draft.rng, draft.tensors()
    h, w = rng.choice(result), rng.choice(result[:4])
    choice = rng.randrange(6)
    if choice < 3:
        return draft.call(F.linear, h, w)
    if choice == 3:
        transposed = draft.call("t", w)
        return transposed and draft.call(torch.matmul, h, transposed)
    if choice == 4:
        return draft.call(torch.addmm, rng.choice(result), h, w)
    return draft.call(torch.einsum, rng.choice(["nd,vd->nv", "btd,vd->btv", "...d,vd->...v", "nd,dv->vn"]), h, w)


def drawn(seed: object) -> tuple[GraphModule, list[Tensor]]:
    """A random graph and inputs for it."""
    rng = random.Random(str(seed))
    torch.manual_seed(rng.randrange(2**31))
    draft = Draft(rng)
    dtype = rng.choice(DTYPES)
    rows = rng.choice(ROWS[:2] * 3 + ROWS)
    h = draft.given(values((*rows, D), dtype), learns=rng.random() < 0.8)
    w = values(rng.choice(WEIGHTS), dtype if rng.random() < 0.9 else rng.choice(DTYPES))
    if rng.random() < 0.03:
        w = TwoTensor(w, w.clone())
    weight = draft.given(w.to_sparse() if rng.random() < 0.02 and type(w) is Tensor else w, learns=rng.random() < 0.8)
    draft.given(torch.randint(0, V, rows))
    draft.given(values((V,), torch.float32), learns=rng.random() < 0.5)
    draft.given(torch.rand(rows) > 0.5)
    if draft.call(F.linear, h, weight) is None:
        project(draft)
    for _ in range(rng.randrange(0, 6)):
        step(draft)
    for _ in range(rng.randrange(1, 3)):
        loss(draft)
        for _ in range(rng.randrange(0, 4)):
            step(draft)
    if not draft.recorded:
        draft.graph.call_function(torch._C._set_grad_enabled, (True,)).meta["example_value"] = None
    late = [n for n in draft.tensors() if n.op != "placeholder"]
    kept = dict.fromkeys([*late[-1:], *rng.sample(late, min(len(late), rng.randrange(0, 3)))])
    draft.graph.output(tuple(kept))
    draft.graph.lint()
    return GraphModule(torch.nn.Module(), draft.graph), draft.inputs

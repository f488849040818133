"""Small language models whose head is to be split, and how they are trained: on ranks, or on one process in eager mode.

A `Setting` says on which device, in which dtype, how large and through which compiler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fusedhead.backend import compile_graph
from fusedhead.options import split_options

STEPS = 2


class Setting(NamedTuple):
    """How the programs of an arrangement are run. B rows of T tokens, hidden size D."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    inductor: bool = False
    depth: int = 16
    batch: int = 4
    time: int = 8  # equal shards for two and for four ranks: torch flattens no uneven ones
    scale: int = 1  # of every vocabulary
    count: bool = True  # whether the collectives of the last step are counted
    seed: int = 0


class Model(nn.Module):
    """A language model with its loss inside."""

    def __init__(
        self,
        depth: int,
        vocab: int,
        bias: bool = False,
        loss: Callable[..., Tensor] = F.cross_entropy,
        checkpointed: bool = False,
        blocks: bool = True,
        second: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm = nn.Embedding(vocab, depth), nn.LayerNorm(depth)
        self.lin = nn.Linear(depth, depth) if blocks else None
        self.head, self.loss = nn.Linear(depth, vocab, bias=bias), loss
        self.second = nn.Linear(depth, second, bias=False) if second else None  # another head
        self.checkpointed = checkpointed

    def of_hidden(self, h: Tensor, y: Tensor) -> Tensor:
        loss = self.loss(self.head(h).flatten(0, 1), y.flatten())
        if self.second is None:
            return loss
        return loss + self.loss(self.second(h).flatten(0, 1), (y % self.second.out_features).flatten())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.norm(h if self.lin is None else h + torch.tanh(self.lin(h)))
        if self.checkpointed:
            return checkpoint(self.of_hidden, h, y, use_reentrant=False)  # type: ignore[no-any-return]
        return self.of_hidden(h, y)


def data(setting: Setting, vocab: int, ignored: float, below: int | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and labels, the latter ``below`` a class where that is given."""
    g = torch.Generator().manual_seed(7 + setting.seed)
    shape = (setting.batch, setting.time)
    x, y = torch.randint(0, vocab, shape, generator=g), torch.randint(0, below or vocab, shape, generator=g)
    y = torch.where(torch.rand(shape, generator=g) < ignored, -100, y)
    return x.to(setting.device), y.to(setting.device)


def whole(x: Any) -> Tensor:
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone().cpu()


def compiled(model: Any, setting: Setting, records: list[Any], **options: Any) -> Callable[..., Any]:
    operands = {"min_logits": 1, **options}
    ours, _ = split_options({f"fusedhead.{name}": value for name, value in operands.items()})

    def inner(gm: Any, inputs: Any) -> Any:
        if setting.inductor:
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(gm, inputs)
        return aot_eager(gm, inputs)

    def backend(gm: Any, inputs: Any) -> Any:
        return compile_graph(gm, inputs, ours, inner, lambda report: records.extend(report.heads))

    torch._dynamo.reset()
    return torch.compile(model, backend=backend)  # type: ignore[no-any-return]


def counted(run: Callable[[], Any], count: bool) -> tuple[Any, dict[str, int]]:
    """What is returned, and how often each collective was called."""
    if not count:  # compiling under a profiler takes long
        return run(), {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    names = (event.name.removeprefix("c10d::") for event in profile.events() if event.name.startswith("c10d::"))
    return result, dict(Counter(names))


def train(
    model: nn.Module,
    setting: Setting,
    batch: tuple[Tensor, Tensor],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    eager: bool = False,
    micro: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Losses, first gradients, parameters after two steps, the report, and the collectives of the second step."""
    records: list[Any] = []
    step = model if eager else compiled(model, setting, records, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, foreach=False)
    x, y = batch
    losses, gradients = [], {}
    forward: dict[str, int] = {}
    backward: dict[str, int] = {}
    for at in range(STEPS):
        count, total = setting.count and at > 0 and not eager, torch.zeros(())
        for part in range(micro):
            with around():
                loss, forward = counted(partial(step, x[part::micro], y[part::micro]), count)
                _, backward = counted(loss.backward, count)
            total = total + whole(loss)
        if at == 0:
            gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "parameters": {name: whole(p) for name, p in model.named_parameters()},
        "heads": [(head.fused, head.reason, head.vocab_size, head.tokens) for head in records],
        "engines": [head.engine for head in records],
        "forward": forward,
        "backward": backward,
    }


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float() / 2, y, label_smoothing=0.1)


def total(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum") / 7


def everything(z: Tensor, y: Tensor) -> Tensor:
    """lse and its square, the label's logit, the sum, the entropy, and where the maximum is."""
    log_p = F.log_softmax(z, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    right = (z.argmax(-1) == y).float().mean()
    loss = F.cross_entropy(z, y, label_smoothing=0.1)
    return loss + 1e-2 * (z.logsumexp(-1) ** 2).mean() + 0.1 * entropy.mean() + right

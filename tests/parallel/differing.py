"""Programs in which the ranks do not do the same: what each rank does in `test_differing_ranks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fusedhead.legality import agreement
from tests.parallel.arrangements import LOCAL, V, colwise, program, tp_mesh
from tests.parallel.models import Model, Setting, train


class OneRankTakesALoss(Model):
    """Rank 0 takes the loss of the logits that all ranks have gathered, the others a mean of the hidden states."""

    def of_hidden(self, h: Tensor, y: Tensor) -> Tensor:
        z = self.head(h)
        if dist.get_rank() == 0:
            return self.loss(z.flatten(0, 1), y.flatten())
        return z.square().mean()


class OwnRows(Model):
    """Every rank takes the loss of tokens of its own."""

    def of_hidden(self, h: Tensor, y: Tensor) -> Tensor:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        size = h.shape[0] // ranks
        rows = slice(rank * size, (rank + 1) * size)
        return self.loss(self.head(h)[rows].flatten(0, 1), y[rows].flatten())


class OwnTemperature(Model):
    """Every rank divides the logits of a token by a number of its own."""

    def of_hidden(self, h: Tensor, y: Tensor) -> Tensor:
        z = self.head(h).flatten(0, 1)
        by = torch.linspace(1.0, 2.0 + dist.get_rank(), len(z))
        return self.loss(z / by[:, None], y.flatten())


class OwnScale(Model):
    """Every rank weights the square of its loss by a number of its own."""

    def of_hidden(self, h: Tensor, y: Tensor) -> Tensor:
        loss = self.loss(self.head(h).flatten(0, 1), y.flatten())
        return loss * loss * (0.5 + dist.get_rank())


def both(kind: type[Model], vocab: int = V, labels: int = 0, **options: Any) -> tuple[Any, Any]:
    """(ours, torch's own): the same program on these ranks, compiled and in eager mode.

    Each has a number of classes of its own: what ranks have agreed on holds for the next program with the same head.
    """
    result, of = [], program(vocab)
    for eager in (False, True):
        model, setting = of.made(Setting(), kind), Setting(count=False)
        style = ColwiseParallel(output_layouts=Replicate(), use_local_output=True)
        parallelize_module(model, tp_mesh(setting), {"head": style})
        x, y = of.batch(setting)
        result.append(train(model, setting, (x, (y + labels * dist.get_rank()) % of.vocab), eager=eager, **options))
    return result[0], result[1]


def wrong_label() -> str:
    """A label that is no class, on rank 1 alone."""
    model, setting = program().made(Setting(), Model), Setting(count=False)
    parallelize_module(
        model, tp_mesh(setting), {"head": ColwiseParallel(output_layouts=Replicate(), use_local_output=True)}
    )
    x, y = program().batch(setting)
    try:
        train(model, setting, (x, y + 1000 * dist.get_rank()))
    except IndexError as error:
        return str(error)
    return "no error"


def outcomes() -> dict[str, Any]:
    agreement.WAIT = 3.0
    rank = dist.get_rank()
    results: dict[str, Any] = {
        "labels of its own": both(Model, labels=5),
        "labels and a scale of its own": both(OwnScale, 93, labels=5),
        "rows of its own": both(OwnRows, 92),
        "a number of its own": both(OwnTemperature, 91),
        "a loss on one rank": both(OneRankTakesALoss, 90),
        "another option": both(Model, 95, shards=rank == 0),
        "another budget": both(Model, 89, memory="min" if rank else "auto"),
        "off": colwise(Setting(), program(94), **LOCAL, shards=False),
        "on again": colwise(Setting(), program(94), **LOCAL),
        "a wrong label": wrong_label(),
    }
    return results

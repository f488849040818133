"""Vocabulary-parallel cross entropies as people write them, and transformers' own plan: what each rank does."""

from __future__ import annotations

import traceback
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

from tests.parallel.arrangements import program, tp_mesh
from tests.parallel.models import Model, Setting, train


class SummedGradient(torch.autograd.Function):
    """Hidden states that all ranks have; their gradient is summed over the ranks (Megatron's f)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return funcol.all_reduce(g.contiguous(), "sum", dist.group.WORLD)


class Summed(torch.autograd.Function):
    """A sum over the ranks whose gradient passes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return funcol.all_reduce(x, "sum", dist.group.WORLD)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class MegatronCrossEntropy(torch.autograd.Function):
    """Megatron-LM's: maximum, the label's logit and the sum of exponentials, each reduced; softmax kept for later."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        z = z.float()
        z = z - funcol.all_reduce(z.max(-1)[0], "max", dist.group.WORLD).unsqueeze(-1)
        first = dist.get_rank() * z.shape[-1]
        elsewhere = (y < first) | (y >= first + z.shape[-1])
        cell = torch.where(elsewhere, 0, y - first)
        picked = torch.where(elsewhere, 0.0, z.gather(-1, cell.unsqueeze(-1)).squeeze(-1))
        picked = funcol.all_reduce(picked, "sum", dist.group.WORLD)
        e = z.exp()
        total = funcol.all_reduce(e.sum(-1), "sum", dist.group.WORLD)
        ctx.save_for_backward(e / total.unsqueeze(-1), elsewhere, cell)
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        p, elsewhere, cell = ctx.saved_tensors
        d = p.scatter_add(-1, cell.unsqueeze(-1), -(~elsewhere).to(p.dtype).unsqueeze(-1))
        return d * g.unsqueeze(-1), None


def megatron(z: Tensor, y: Tensor) -> Tensor:
    return MegatronCrossEntropy.apply(z, y).mean()  # type: ignore[no-any-return]


def cut_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """A local lse and the label's logit first, then collectives on [N]."""
    z = z.float()
    first = dist.get_rank() * z.shape[-1]
    lse = torch.logsumexp(z, -1)
    top = funcol.all_reduce(lse.detach(), "max", dist.group.WORLD)
    total = Summed.apply((lse - top).exp())
    inside = (y >= first) & (y < first + z.shape[-1])
    cell = torch.where(inside, y - first, 0)
    picked = torch.where(inside, z.gather(-1, cell.unsqueeze(-1)).squeeze(-1), 0.0)
    return (top + total.log() - Summed.apply(picked)).mean()


def functional(z: Tensor, y: Tensor) -> Tensor:
    """torchtitan's form: maximum, sum and label reduced one after another, in the graph."""
    z = z.float()
    first = dist.get_rank() * z.shape[-1]
    top = funcol.all_reduce(z.detach().amax(-1), "max", dist.group.WORLD)
    shifted = z - top.unsqueeze(-1)
    total = Summed.apply(shifted.exp().sum(-1))
    inside = (y >= first) & (y < first + z.shape[-1])
    cell = torch.where(inside, y - first, 0)
    picked = torch.where(inside, shifted.gather(-1, cell.unsqueeze(-1)).squeeze(-1), 0.0)
    return (total.log() - Summed.apply(picked)).mean()


class OwnShard(Model):
    """A model whose head is this rank's rows, plain tensors."""

    def split(self) -> OwnShard:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.head.weight = nn.Parameter(self.head.weight.detach().chunk(ranks)[rank].clone())
        return self

    def of_hidden(self, h: Tensor, y: Tensor) -> Tensor:
        z = nn.functional.linear(SummedGradient.apply(h), self.head.weight)
        return self.loss(z.flatten(0, 1), y.flatten())  # type: ignore[no-any-return]


VOCAB = 2048  # as many that a shard is taken for a head
FORMS = {"megatron": megatron, "cut_cross_entropy": cut_cross_entropy, "functional": functional}


def of_form(name: str) -> dict[str, Any]:
    of = program(VOCAB, loss=FORMS[name])
    model = of.made(Setting(), OwnShard)
    assert isinstance(model, OwnShard)
    return train(model.split(), Setting(count=False), of.batch(Setting()))


def transformers_plan() -> dict[str, Any]:
    """A tiny Llama under ``tp_plan="auto"``: its head is gathered, local."""
    import tempfile

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        alone = LlamaForCausalLM(config)
        alone.save_pretrained(folder)  # which rank 0 does
        folders = [folder]
        dist.broadcast_object_list(folders)
        llama = LlamaForCausalLM.from_pretrained(folders[0], tp_plan="auto", device_mesh=tp_mesh(Setting()))
        dist.barrier()
    x, y = program().batch(Setting())

    class Loss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.model(input_ids=x, labels=y, use_cache=False).loss  # type: ignore[no-any-return]

    ours = train(Loss(llama), Setting(count=False), (x, y))
    return ours | {"one process": train(Loss(alone.float()), Setting(count=False), (x, y), eager=True)}


def outcomes() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in (*FORMS, "transformers"):
        try:
            results[name] = transformers_plan() if name == "transformers" else of_form(name)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-2500:]}"
    return results

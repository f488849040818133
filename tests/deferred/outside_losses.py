"""Losses as public training code writes them outside of the compiled model.

Each is our own rendering of a form in patterns of litgpt, Transformers, TRL, torchtune, torchtitan and
lm-evaluation-harness. `FORMS` names the fused ops that each takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.deferred.heads import B, T, V

Y = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0]]).bool()
IN_THE_FORWARD = ["head_loss"]
ONE_SWEEP = ["head_stats", "head_stats_backward"]
LABELS_AND_SWEEP = ["head_stats"] * 2 + ["head_stats_backward"] * 2  # labels alone take no sweep


def flattened(z: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, z.size(-1)), Y.view(-1))


def shifted_by_slicing(z: Tensor) -> Tensor:
    """The older Transformers models, and most scripts."""
    z, y = z[..., :-1, :].contiguous(), Y[..., 1:].contiguous()
    return F.cross_entropy(z.view(-1, V).float(), y.view(-1).to(z.device))


def shifted_by_padding(z: Tensor) -> Tensor:
    y = F.pad(Y, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(z.float().view(-1, V), y.view(-1), ignore_index=-100, reduction="sum") / 7


def classes_second(z: Tensor) -> Tensor:
    return F.cross_entropy(z.transpose(1, 2), Y)


def smoothed_natively(z: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), Y.flatten(), label_smoothing=0.1)


def criterion(z: Tensor) -> Tensor:
    return torch.nn.CrossEntropyLoss(ignore_index=3)(z.reshape(-1, V), Y.reshape(-1))


def log_softmax_and_nll(z: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(z, dim=-1).flatten(0, 1), Y.flatten())


def masked_logits(z: Tensor) -> Tensor:
    return F.cross_entropy(z[MASK], Y[MASK])


def torchtitan(z: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1).float(), Y.flatten(0, 1), reduction="sum", ignore_index=-100) / 11


def per_token_log_probabilities(z: Tensor) -> Tensor:
    """DPO and its relatives."""
    z, y = z[:, :-1], Y[:, 1:].clone()
    keep = y != 5
    y[~keep] = 0
    logps = torch.gather(z.log_softmax(-1), dim=2, index=y.unsqueeze(2)).squeeze(2)
    return -F.logsigmoid((logps * keep).sum(-1)).mean()


def label_smoother(z: Tensor) -> Tensor:
    """Transformers' Trainer with label_smoothing_factor."""
    z, y = z[..., :-1, :].contiguous(), Y[..., 1:].contiguous()
    log_probs = -F.log_softmax(z, dim=-1)
    if y.dim() == log_probs.dim() - 1:
        y = y.unsqueeze(-1)
    padding = y.eq(-100)
    y = torch.clamp(y, min=0)
    nll = log_probs.gather(dim=-1, index=y)
    smooth = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(padding, 0.0)
    smooth.masked_fill_(padding, 0.0)
    counted = padding.numel() - padding.long().sum()
    return 0.9 * nll.sum() / counted + 0.1 * smooth.sum() / (counted * log_probs.shape[-1])


def selective_log_softmax(z: Tensor) -> Tensor:
    """TRL, in float32: one logsumexp a sequence."""
    z, index = z[:, :-1] / 0.7, Y[:, 1:]
    chosen = torch.gather(z, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
    lse = torch.stack([torch.logsumexp(row, dim=-1) for row in z])
    ratio = torch.exp(chosen - lse - (chosen - lse).detach())
    return -(ratio * torch.linspace(-1, 1, ratio.numel()).view_as(ratio)).mean()


def selective_log_softmax_by_rows(z: Tensor) -> Tensor:
    """TRL, in bfloat16: one log_softmax a sequence."""
    results = []
    for row, index in zip(z, Y):
        results.append(F.log_softmax(row, dim=-1).gather(dim=-1, index=index.unsqueeze(-1)).squeeze(-1))
    return -torch.stack(results).mean()


def entropy_bonus(z: Tensor) -> Tensor:
    """TRL's entropy_from_logits, by chunks of rows."""
    flat, result = z.reshape(-1, z.shape[-1]), []
    for chunk in flat.split(5, dim=0):
        logps = F.log_softmax(chunk, dim=-1)
        result.append(-(torch.exp(logps) * logps).sum(-1))
    return torch.cat(result).reshape(z.shape[:-1]).mean()


def policy_and_entropy(z: Tensor) -> Tensor:
    logps = selective_log_softmax(z)
    with torch.no_grad():
        entropy = entropy_bonus(z[:, :-1] / 0.7)
    return logps * (1 + 0 * entropy)


def litgpt_chunks_after_the_head(z: Tensor) -> Tensor:
    pieces = [piece.reshape(-1, z.size(-1)) for piece in z.split(2, dim=1)]
    labels = [piece.reshape(-1) for piece in Y.split(2, dim=1)]
    losses = [F.cross_entropy(p, y, ignore_index=-100, reduction="none") for p, y in zip(pieces, labels)]
    return torch.cat(losses).sum() / max(1, int((Y != -100).sum()))


def torchtune_chunked_output(z: Tensor) -> Tensor:
    chunks = [chunk.reshape(-1, chunk.size(-1)) for chunk in z.chunk(3, dim=1)]
    labels = [chunk.reshape(-1) for chunk in Y.chunk(3, dim=1)]
    total = torch.zeros(())
    for chunk, y in zip(chunks, labels):
        total = total + F.cross_entropy(chunk.float(), y, ignore_index=-100, reduction="sum")
    return total / (Y != -100).sum()


def litgpt_chunks_of_flat_logits(z: Tensor) -> Tensor:
    flat, y = z.reshape(-1, z.size(-1)), Y.reshape(-1)
    losses = [F.cross_entropy(p, t, ignore_index=-100, reduction="none") for p, t in zip(flat.split(5), y.split(5))]
    counted = (y != -100).sum()
    return torch.cat(losses).sum() / counted.maximum(torch.ones_like(counted))


def torchtitan_log_probabilities(z: Tensor) -> Tensor:
    z = z.float()
    logps = -F.cross_entropy(z.flatten(0, 1), Y.flatten(), reduction="none", ignore_index=-100)
    with torch.no_grad():
        entropy = torch.logsumexp(z, -1) - (torch.softmax(z, -1) * z).sum(-1)
    return -(logps * (1 + 0 * entropy.flatten())).mean()


def entropy_by_products(z: Tensor) -> Tensor:
    """verl."""
    return (torch.logsumexp(z, dim=-1) - torch.sum(torch.softmax(z, dim=-1) * z, dim=-1)).mean()


def own_confidence_weighs(z: Tensor) -> Tensor:
    """TRL's dft loss."""
    logps = torch.gather(z[:, :-1].log_softmax(-1), 2, Y[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (-logps.exp().detach() * logps * MASK[:, 1:]).sum() / MASK[:, 1:].sum()


def own_confidence_of_chosen_tokens(z: Tensor) -> Tensor:
    """LLaMA-Factory's."""
    each = F.cross_entropy(z.float().view(-1, V), Y.view(-1), reduction="none")[MASK.view(-1)]
    return (torch.exp(-each).detach() * each).mean()


def mean_logits_for_the_log(z: Tensor) -> Tensor:
    """TRL's DPO and ORPO."""
    with torch.no_grad():
        mean = z[:1].detach().mean() + z[1:].detach().mean()
    return F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), Y[..., 1:].reshape(-1)) + 0 * mean


def collision_weights(z: Tensor) -> Tensor:
    """WPO: the logsumexp of the doubled logits."""
    logps = z.log_softmax(-1).gather(2, Y.unsqueeze(-1)).squeeze(-1)
    weights = (torch.logsumexp(2 * z, -1) - 2 * torch.logsumexp(z, -1)).detach()
    return -((logps - weights) * MASK).sum()


def a_temperature_per_token(z: Tensor) -> Tensor:
    """prime-rl."""
    temperature = torch.linspace(0.5, 1, B * T).view(B, T)
    return -(z / temperature.unsqueeze(-1)).log_softmax(-1).gather(2, Y.unsqueeze(-1)).mean()


def timm_label_smoothing(z: Tensor) -> Tensor:
    logps = F.log_softmax(z.view(-1, V), dim=-1)
    nll = -logps.gather(dim=-1, index=Y.view(-1).unsqueeze(1)).squeeze(1)
    return (0.9 * nll + 0.1 * -logps.mean(dim=-1)).mean()


def with_z_loss(z: Tensor) -> Tensor:
    flat = z.view(-1, V)
    return F.cross_entropy(flat, Y.view(-1)) + 1e-2 * torch.logsumexp(flat, -1).pow(2).mean()


def unmasked_token_loop(z: Tensor) -> Tensor:
    return sum(F.cross_entropy(z[i, 1:-1], Y[i, 1:-1]) for i in range(B)) / B


FORMS: dict[Callable[[Tensor], Tensor], list[str]] = {
    flattened: IN_THE_FORWARD,
    shifted_by_slicing: IN_THE_FORWARD,
    shifted_by_padding: IN_THE_FORWARD,
    classes_second: IN_THE_FORWARD,
    smoothed_natively: IN_THE_FORWARD,
    criterion: IN_THE_FORWARD,
    log_softmax_and_nll: IN_THE_FORWARD,
    masked_logits: IN_THE_FORWARD,
    torchtitan: IN_THE_FORWARD,
    per_token_log_probabilities: ONE_SWEEP,
    label_smoother: ONE_SWEEP,
    selective_log_softmax: LABELS_AND_SWEEP,
    selective_log_softmax_by_rows: ["head_stats"] * 2 + ["head_stats_backward"] * 2,
    entropy_bonus: ONE_SWEEP,
    policy_and_entropy: ["head_stats", *LABELS_AND_SWEEP],
    litgpt_chunks_after_the_head: ["head_stats"] * 3 + ["head_stats_backward"] * 3,
    torchtune_chunked_output: ["head_stats"] * 3 + ["head_stats_backward"] * 3,
    litgpt_chunks_of_flat_logits: ["head_stats"] * 3 + ["head_stats_backward"] * 3,
    torchtitan_log_probabilities: ["head_stats"] * 2 + ["head_stats_backward"],
    entropy_by_products: LABELS_AND_SWEEP,
    own_confidence_weighs: ONE_SWEEP,
    own_confidence_of_chosen_tokens: ONE_SWEEP,
    mean_logits_for_the_log: ["head_stats"] * 2 + IN_THE_FORWARD,
    collision_weights: ["head_stats"] * 2 + ["head_stats_backward"],
    a_temperature_per_token: ONE_SWEEP,
    timm_label_smoothing: ONE_SWEEP,
    with_z_loss: ["head_loss", *ONE_SWEEP],
    unmasked_token_loop: ["head_stats"] * 2 + ["head_stats_backward"] * 2,
}

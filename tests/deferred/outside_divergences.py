"""Divergences as public training code writes them, of a student's logits and a teacher's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.deferred.heads import V

MASK = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0]]).bool()
BOTH_WAYS = ["head_rows", "head_rows_backward"]  # a call gives a number a token: what follows is not known yet
AT_ONCE = ["head_rows_loss"]  # a call gives the loss
# what runs on a teacher that is a tensor: the program's own calls, views, and at most one copy
ON_A_TENSOR = {"exp", "add", "abs", "eq", "view", "_reshape_alias", "clone"}


def forward_kl(s: Tensor, lt: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(s / 2, -1), lt.exp(), reduction="batchmean") * 4


def log_target_kl(s: Tensor, lt: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(s.view(-1, V), 1), lt.view(-1, V), log_target=True, reduction="sum")


def reverse_kl(s: Tensor, lt: Tensor) -> Tensor:
    return (s.softmax(-1) * (s.log_softmax(-1) - lt)).sum(-1).mean()


def generalized_jsd(s: Tensor, lt: Tensor) -> Tensor:
    """TRL's GKD: a mixture by logsumexp, both divergences without reduction, then the tokens of the labels."""
    ls, beta = F.log_softmax(s / 0.9, dim=-1), torch.tensor(0.3)
    mixture = torch.logsumexp(torch.stack([ls + torch.log1p(-beta), lt + torch.log(beta)]), dim=0)
    teacher = F.kl_div(mixture, lt, reduction="none", log_target=True)
    student = F.kl_div(mixture, ls, reduction="none", log_target=True)
    jsd = (beta * teacher + (1 - beta) * student)[MASK]
    return jsd.sum() / MASK.sum()


def where_finite(s: Tensor, lt: Tensor) -> Tensor:
    """MiniLLM: products with infinite logits count as zero."""
    student = F.log_softmax(s, dim=-1, dtype=torch.float32)
    product = torch.masked_fill(lt.exp() * student, torch.isinf(s), 0)
    each = torch.sum(product, dim=-1).view(-1)
    return -torch.sum(each * MASK.view(-1), dim=0) / torch.sum(MASK.view(-1).int(), dim=0)


def soft_targets(s: Tensor, lt: Tensor) -> Tensor:
    return F.cross_entropy(s.view(-1, V), lt.exp().view(-1, V), label_smoothing=0.1)


def total_variation(s: Tensor, lt: Tensor) -> Tensor:
    return 0.5 * (s.softmax(-1) - lt.exp()).abs().sum(-1).mean()


def weighted_tokens(s: Tensor, lt: Tensor) -> Tensor:
    each = F.kl_div(s.log_softmax(-1), lt, log_target=True, reduction="none")
    return (each * MASK.unsqueeze(-1)).sum() / MASK.sum()


def a_stretch_of_tokens(s: Tensor, lt: Tensor) -> Tensor:
    each = F.kl_div(s.log_softmax(-1), lt, log_target=True, reduction="none")
    return each[:, 1:4].sum() / 3


def reverse_kl_in_place(s: Tensor, lt: Tensor) -> Tensor:
    """torchtune: infinite logits of either model count as zero, one product is subtracted from the other in place."""
    p, ls = F.softmax(s, dim=-1, dtype=torch.float32), F.log_softmax(s, dim=-1, dtype=torch.float32)
    infinite = torch.isinf(s) | torch.isinf(lt)
    products = torch.masked_fill(p * lt, infinite, 0)
    products -= torch.masked_fill(p * ls, infinite, 0)
    each = torch.sum(products, dim=-1).view(-1)
    return -torch.sum(each * MASK.view(-1), dim=0) / torch.sum(MASK.view(-1).int(), dim=0)


def squared_distance(s: Tensor, lt: Tensor) -> Tensor:
    return F.mse_loss(s.log_softmax(-1), lt)


FORMS = [
    forward_kl, log_target_kl, reverse_kl, reverse_kl_in_place, generalized_jsd, where_finite, soft_targets,
    total_variation, squared_distance, weighted_tokens, a_stretch_of_tokens,
]  # fmt: skip
ENDS_IN_A_LOSS = {
    forward_kl, log_target_kl, generalized_jsd, soft_targets, squared_distance, weighted_tokens, a_stretch_of_tokens
}  # fmt: skip
Form = Callable[[Tensor, Tensor], Tensor]


CASES = [(form, "deferred") for form in FORMS]
CASES += [(form, "a tensor") for form in (forward_kl, reverse_kl_in_place, generalized_jsd, soft_targets)]

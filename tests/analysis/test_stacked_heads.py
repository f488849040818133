"""Several heads whose logits are one tensor under one loss: codebooks of audio models, heads that look ahead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.programs.claims import B, D, T, V, compiled, hidden, labels, right, weight

K = 3
EAGER = {"fusedhead.logits": "eager"}
Stacked = Callable[[Tensor, Tensor, Tensor], Tensor]  # of h [B, T, D], w [K, V, D], b [K, V]: [B, T, K, V]

SPELLINGS: dict[str, Stacked] = {
    "stack": lambda h, w, b: torch.stack([F.linear(h, w[k]) for k in range(K)], 2),
    "stack, biases": lambda h, w, b: torch.stack([F.linear(h, w[k], b[k]) for k in range(K)], dim=-2),
    "stack, moved": lambda h, w, b: torch.stack([h @ w[k].T for k in range(K)]).permute(1, 2, 0, 3),
    "one weight, viewed": lambda h, w, b: F.linear(h, w.view(-1, D), b.view(-1)).view(B, T, K, V),
    "einsum": lambda h, w, b: torch.einsum("btd,kvd->btkv", h, w),
    "einsum, weights transposed": lambda h, w, b: torch.einsum("btd,kdv->kbtv", h, w.mT).permute(1, 2, 0, 3),
}

Loss = Callable[[Tensor, Tensor], object]  # of z [B, T, K, V], y [B, T, K]
LOSSES: dict[str, Loss] = {
    "mean": lambda z, y: F.cross_entropy(z.reshape(-1, V), y.reshape(-1), ignore_index=0),
    "shifted": lambda z, y: F.cross_entropy(
        z[:, :-1].float().reshape(-1, V), y[:, 1:].reshape(-1), label_smoothing=0.1
    ),
    "classes moved": lambda z, y: F.cross_entropy(z.permute(0, 3, 1, 2), y, reduction="none").sum(-1).mean(),
    "heads first": lambda z, y: F.cross_entropy(z.transpose(1, 2).reshape(-1, V), y.transpose(1, 2).reshape(-1)),
    "capped": lambda z, y: F.cross_entropy((5 * torch.tanh(z / 5)).flatten(0, 2), y.flatten()),
    "a bias for all": lambda z, y: F.cross_entropy((z + torch.arange(V) * 0.1).flatten(0, 2), y.flatten()),
    "fewer classes": lambda z, y: F.cross_entropy(z[..., : V - 2].flatten(0, 2), y.flatten().clamp(max=V - 3)),
    "log-probabilities": lambda z, y: z.log_softmax(-1).gather(-1, y[..., None])[..., 0].sum(-1).exp().mean(),
    "some heads": lambda z, y: F.cross_entropy(z[:, :, 1:].flatten(0, 2), y[:, :, 1:].flatten()),
    "beside the entropy": lambda z, y: F.cross_entropy(z.flatten(0, 2), y.flatten())
    - 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "beside the accuracy": lambda z, y: (
        F.cross_entropy(z.flatten(0, 2), y.flatten()), (z.argmax(-1) == y).float().mean(),
    ),
}  # fmt: skip


def inputs() -> list[Tensor]:
    return [hidden(), weight(K, V, D), weight(K, V), labels(B, T, K)]


def program(spelling: str, loss: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], object]:
    return lambda h, w, b, y: LOSSES[loss](SPELLINGS[spelling](h, w, b), y)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_heads_in_every_spelling_are_a_sweep_each(spelling: str) -> None:
    report = right(program(spelling, "shifted"), *inputs())
    assert report.after.count("fusedhead.head_loss.default(") == K


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_stacked_heads(loss: str) -> None:
    right(program("stack, biases", loss), *inputs())
    right(program("one weight, viewed", loss), *inputs())


def test_heads_joined_along_the_tokens() -> None:
    def joined(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = torch.cat([F.linear(h, w[k]) for k in range(K)], 1)
        return F.cross_entropy(z[:, 1:].reshape(-1, V), y[:, 1:].reshape(-1))

    report = right(joined, hidden(), weight(K, V, D), labels(B, K * T))
    assert report.after.count("fusedhead.head_loss.default(") == K


def test_a_head_for_every_position() -> None:
    def depth_decoder(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = torch.stack([F.linear(h[:, k, :], w[k].T) for k in range(K)], dim=1)
        return F.cross_entropy(z.float().view(-1, V), y.view(-1))

    right(depth_decoder, hidden(B, K, D), weight(K, D, V), labels(B, K))


@pytest.mark.parametrize("product", ["bmm", "matmul", "einsum"])
def test_hidden_states_of_every_head(product: str) -> None:
    """Told from attention by the weight: it must be a parameter."""
    w, y = weight(K, V, D), labels(K, 6)

    def program(h: Tensor) -> Tensor:
        z = {"bmm": lambda: torch.bmm(h, w.mT), "matmul": lambda: h @ w.mT,
             "einsum": lambda: torch.einsum("knd,kvd->knv", h, w)}[product]()  # fmt: skip
        return F.cross_entropy(z.view(-1, V), y.view(-1))

    right(program, hidden(K, 6, D))
    h = hidden(K, 6, D)
    got, expected = Rewritten(program)(h), program(h)
    torch.testing.assert_close(torch.autograd.grad(got, [h, w]), torch.autograd.grad(expected, [h, w]))


@pytest.mark.parametrize("logits", ["eager", "deferred"])
@pytest.mark.parametrize("spelling", ["stack", "one weight, viewed", "einsum"])
def test_stacked_logits_beside_their_loss(spelling: str, logits: str) -> None:
    def returned(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = SPELLINGS[spelling](h, w, b)
        return F.cross_entropy(z.view(-1, V), y.view(-1)), z

    right(returned, *inputs(), options={"fusedhead.logits": logits})


def test_token_counts_of_stacked_heads_may_be_symbols() -> None:
    w, b = weight(K, V, D), weight(K, V)

    def symbolic(h: Tensor, y: Tensor) -> Tensor:
        z = SPELLINGS["stack, biases"](h, w, b)[:, 1:]
        return F.cross_entropy(z.reshape(-1, V), y[:, 1:].reshape(-1))

    right(symbolic, hidden(), labels(B, T, K), dynamic=True)


def test_without_gradients_stacked_heads_run_forward_only() -> None:
    def quiet(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return LOSSES["mean"](SPELLINGS["stack"](h, w, b), y)  # type: ignore[return-value]

    assert "forward only" in right(quiet, *inputs()).heads[0].engine


def a_part_used_beside(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    parts = [F.linear(h, w[k]) for k in range(K)]
    return F.cross_entropy(torch.stack(parts, 2).view(-1, V), y.view(-1)), parts[0].sin().sum()


def written_to(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = SPELLINGS["stack"](h, w, b)
    z[:, :, 0] *= 2
    return F.cross_entropy(z.view(-1, V), y.view(-1))


def scaled_in_place(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = SPELLINGS["stack"](h, w, b)
    z.mul_(0.5)
    return F.cross_entropy(z.view(-1, V), y.view(-1))


def a_weight_written_between(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    w = w * 1
    with torch.no_grad():
        first = F.linear(h, w[0])
        w.mul_(2)
        return F.cross_entropy(torch.stack([first, F.linear(h, w[1])], 2).view(-1, V), y[..., :2].reshape(-1))


def a_temperature_per_token(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = SPELLINGS["stack"](h, w, b) / (h.detach().abs().mean(-1)[..., None, None] + 1)
    return F.cross_entropy(z.view(-1, V), y.view(-1))


def averaged(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(SPELLINGS["stack"](h, w, b).mean(2).view(-1, V), y[..., 0].reshape(-1))


def detached_beside(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = SPELLINGS["stack"](h, w, b)
    return F.cross_entropy(z.view(-1, V), y.view(-1)), z.detach().logsumexp(-1)


def picked_by_a_mask(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = SPELLINGS["einsum"](h, w, b)
    return F.cross_entropy(z.view(-1, V)[[5, 0, 7, 7]], y.view(-1)[[5, 0, 7, 7]])


@pytest.mark.parametrize(
    "odd",
    [
        a_part_used_beside, written_to, scaled_in_place, a_weight_written_between, a_temperature_per_token, averaged,
        detached_beside, picked_by_a_mask,
    ],
)  # fmt: skip
def test_stacked_heads_in_odd_places_come_out_right(odd: Callable[..., object]) -> None:
    compiled(odd, inputs(), options=EAGER)


def test_autocast_rounds_stacked_heads_as_in_eager_code() -> None:
    h, w, b, y = inputs()
    loss = program("stack", "mean")
    run = torch.compile(loss, backend="fusedhead")
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = run(h, w, b, y), loss(h, w, b, y)
    torch.testing.assert_close(got, expected, rtol=8e-3, atol=0)

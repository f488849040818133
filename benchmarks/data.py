"""The data sets: hidden states, a weight and labels with the statistics that decide how fast a head runs.

``random`` is a head at its initialisation: logits of variance 1, labels uniform. ``trained`` looks like a trained
model's output: a Zipf-like unigram distribution that every row shares, a few likely tokens a row, a confident
prediction in 70 % of the rows, and every 17th label ignored. Methods that skip small probabilities, and roundings that
hurt only where p is near 1, show themselves there. ``model`` is a real model after some minutes of training, out of a
file.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Case

IGNORED = -100
LIKELY = 5  # likely tokens a row, the label among them
PRIOR_SHARE = 4.0  # length of h along the direction that carries the unigram distribution


class Batch(NamedTuple):
    h: Tensor  # [N, D] hidden states
    w: Tensor  # [V, D] head weight
    y: Tensor  # [N] int64 labels, IGNORED where a token has none
    upstream: Tensor  # [N] float32 gradients of the per-token log-probabilities


def random(case: Case, device: torch.device) -> Batch:
    """Independent normal h and W, logits of variance 1, every label present."""
    n, d, v = case.tokens, case.hidden, case.vocab
    draw = torch.Generator(device).manual_seed(17)
    h = torch.randn(n, d, generator=draw, device=device).to(case.torch_dtype)
    w = torch.empty(v, d, device=device, dtype=case.torch_dtype)
    for rows in w.split(16384):
        rows.copy_(torch.randn(rows.shape, generator=draw, device=device) * d**-0.5)
    y = torch.randint(v, (n,), generator=draw, device=device)
    return Batch(h, w, y, torch.randn(n, generator=draw, device=device))


def trained(case: Case, device: torch.device) -> Batch:
    """Logits like a trained model's: z = log-frequency of the token + peaks at a few likely tokens + noise.

    W_v = r_v + (s_v / b) e with r_v random of length about 1, e a unit vector and s_v = -log(v + 10): token
    ids are ranks, as in a byte-pair vocabulary. h_i = Σ_k a_ik r_k + b e + noise, so that z[i, v] is about
    s_v, and about a_ik + s_v at the likely tokens; a_ik is chosen so that the peaks stand where they should.
    """
    n, d, v = case.tokens, case.hidden, case.vocab
    draw = torch.Generator(device).manual_seed(34)
    prior = -torch.log(torch.arange(v, device=device, dtype=torch.float32) + 10.0)
    direction = torch.nn.functional.normalize(torch.randn(d, generator=draw, device=device), dim=0)
    w = torch.empty(v, d, device=device, dtype=case.torch_dtype)
    for rows, share in zip(w.split(16384), prior.split(16384)):
        noise = torch.randn(rows.shape, generator=draw, device=device) * d**-0.5
        rows.copy_(noise + share[:, None] / PRIOR_SHARE * direction)

    cumulative = torch.cumsum(prior.double().exp(), 0)
    places = torch.rand(n, LIKELY, generator=draw, device=device, dtype=torch.float64) * cumulative[-1]
    tokens = torch.searchsorted(cumulative, places).clamp(max=v - 1)  # [N, LIKELY]
    height = 3.0 * torch.rand(n, LIKELY, generator=draw, device=device)  # logits of the likely tokens
    confident = torch.rand(n, generator=draw, device=device) < 0.7
    height[:, 0] += torch.where(confident, 4.0, -1.0)

    h = PRIOR_SHARE * direction + 0.5 * torch.randn(n, d, generator=draw, device=device)
    for k in range(LIKELY):
        token = tokens[:, k]
        residual = w[token].float() - prior[token, None] / PRIOR_SHARE * direction  # r_k again
        h += (height[:, k] - prior[token])[:, None] * residual
    y = tokens[:, 0].clone()
    y[::17] = IGNORED
    return Batch(h.to(case.torch_dtype), w, y, torch.randn(n, generator=draw, device=device))


def model(case: Case, device: torch.device) -> Batch:
    """Hidden states of held-out text and the head of a GPT-2 124M, as `benchmarks.training_curves` keeps them.

    The file is that of $FUSEDHEAD_MODEL_STATES. Raises ValueError where it has not this many tokens, or other sizes.
    """
    path = os.environ.get("FUSEDHEAD_MODEL_STATES")
    if not path:
        raise ValueError("the data set model needs a file: python -m benchmarks.training_curves --states FILE")
    kept = torch.load(path, map_location=device, weights_only=True)
    h, w, y = kept["h"], kept["w"], kept["y"]
    if len(h) < case.tokens or tuple(w.shape) != (case.vocab, case.hidden):
        raise ValueError(f"{path} has {len(h)} tokens and a head {tuple(w.shape)}, too few or another than {case.text}")
    n, dtype = case.tokens, case.torch_dtype
    upstream = torch.randn(n, generator=torch.Generator(device).manual_seed(17), device=device)
    return Batch(h[:n].to(dtype), w.to(dtype), y[:n].clone(), upstream)


SETS = {"random": random, "trained": trained}  # made here, for any case
ALL_SETS = {**SETS, "model": model}

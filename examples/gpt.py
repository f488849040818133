"""A plain GPT: learned positions, pre-norm blocks, tied embedding and head, the structure and sizes of GPT-2.

`GPT(config)(x, y)` returns (logits, loss), `GPT(config)(x)` returns the last position's logits and None.
This file must not know how, on what or with which compiler the model is trained.

Shapes: B sequences, T positions, D width, H heads, V vocab.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of a GPT. `length` is the longest sequence it can read."""

    layers: int
    heads: int
    width: int
    vocab: int = 50304
    length: int = 1024
    bias: bool = False
    dropout: float = 0.0


SIZES = {
    "tiny": Config(layers=1, heads=2, width=32),
    "demo": Config(layers=4, heads=4, width=256),
    "124M": Config(layers=12, heads=12, width=768),
    "350M": Config(layers=24, heads=16, width=1024),
    "774M": Config(layers=36, heads=20, width=1280),
    "1558M": Config(layers=48, heads=25, width=1600),
}


class Attention(nn.Module):
    """Causal self-attention, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        each = (b, t, self.heads, d // self.heads)
        q, k, v = (part.view(each).transpose(1, 2) for part in self.qkv(x).split(d, dim=2))  # [B, H, T, D/H]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return F.dropout(self.out(y.transpose(1, 2).reshape(b, t, d)), self.dropout, self.training)


class MLP(nn.Module):
    """[B, T, D] -> [B, T, 4D] -> [B, T, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.out = nn.Linear(4 * config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.out(F.gelu(self.up(x))), self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """The whole model. The head's weight is the token embedding's."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            if name.endswith("out.weight"):  # two additions a layer to the residual stream: keep its variance
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [B, T] token ids, y [B, T] the next ones (-1: no target) -> logits [B, T, V] and their mean loss;
        without y -> logits [B, 1, V] of the last position and None."""
        positions = torch.arange(x.shape[1], device=x.device)
        h = F.dropout(self.tokens(x) + self.positions(positions), self.config.dropout, self.training)
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        if y is None:
            return self.head(h[:, [-1], :]), None
        logits = self.head(h)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)
        return logits, loss


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

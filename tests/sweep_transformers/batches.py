"""A small training batch for any transformers model, read off the signature of its ``forward``.

Text goes in as random token ids with labels; what a model needs beside or instead of text is a row of `EXTRA`.
This file knows nothing of configurations beyond the sizes it reads from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, TARGETS = 2, 24, 12
LOW, HIGH = 20, 300  # token ids that no tiny configuration gives a meaning

Batch = dict[str, Any]


def ids(rows: int = ROWS, length: int = LENGTH, low: int = LOW, high: int = HIGH) -> Tensor:
    return torch.randint(low, high, (rows, length))


def ignored(labels: Tensor) -> Tensor:
    """The labels with a few entries ignored in every row, as padding and prompts are."""
    labels = labels.clone()
    labels[:, :3] = -100
    labels[0, -2:] = -100
    return labels


def masked(labels: Tensor) -> Tensor:
    """Labels of a masked language model: every fourth position counts."""
    return torch.where(torch.arange(labels.shape[1]) % 4 == 1, labels, -100)


def images(config: Any) -> Tensor:
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    size, channels = getattr(vision, "image_size", 32), getattr(vision, "num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(ROWS, channels, height, width)


# Whole batches by model type, for what a signature does not tell.
EXTRA: dict[str, Callable[[Any, Batch], Batch]] = {}

# Main inputs other than text.
MAIN: dict[str, Callable[[Any], Tensor]] = {
    "pixel_values": images,
    "input_features": lambda c: torch.randn(ROWS, getattr(c, "num_mel_bins", 80), 2 * getattr(c, "max_source_positions", 64)),
    "input_values": lambda c: torch.randn(ROWS, 4000),
    "flattened_patches": lambda c: torch.rand(ROWS, 16, 2 + 3 * 16 * 16),
}


def batch(model: nn.Module, name: str) -> Batch:
    """Keyword arguments of ``model`` (an instance of the class called ``name``), the same ones on every call."""
    torch.manual_seed(1)
    config: Any = model.config
    known = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    made: Batch = {}
    if main in MAIN:
        made[main] = MAIN[main](config)
    if "input_ids" in known and (main not in MAIN or not config.is_encoder_decoder):
        made["input_ids"] = ids()
        made["attention_mask"] = torch.ones(ROWS, LENGTH, dtype=torch.long)
    if "labels" in known:
        if config.is_encoder_decoder:
            made["labels"] = ignored(ids(length=TARGETS))
        elif "MaskedLM" in name or "PreTraining" in name:
            made["labels"] = masked(ids())
        else:
            made["labels"] = ignored(made.get("input_ids", ids()))
    for second in ("next_sentence_label", "sentence_order_label"):
        if second in known:
            made[second] = torch.tensor([0, 1])
    made = {key: value for key, value in made.items() if key in known}
    return EXTRA.get(config.model_type, lambda config, made: made)(config, made)

"""Real text without a network: the sources of Python's standard library, and a small tokenizer trained on them."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

MODULES = ("argparse", "ast", "bisect", "collections/__init__", "functools", "heapq", "json/decoder", "textwrap")
VOCAB = 1024


@functools.cache
def sources() -> list[str]:
    """The texts of some modules."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [(folder / f"{name}.py").read_text() for name in MODULES]


def passages(count: int, characters: int = 200) -> list[str]:
    """``count`` stretches of source text, the same ones on every call."""
    text = "".join(sources())
    step = len(text) // count
    return [text[i * step : i * step + characters] for i in range(count)]


@functools.cache
def tokenizer():  # type: ignore[no-untyped-def]
    """A byte-level BPE of ``VOCAB`` entries as transformers wants it, with the special tokens trainers ask for."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    model = ByteLevelBPETokenizer()
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    model.train_from_iterator(sources(), vocab_size=VOCAB, special_tokens=specials, show_progress=False)
    names = dict(zip(["pad_token", "bos_token", "eos_token", "unk_token", "mask_token"], specials, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, model_max_length=10**6, **names)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    return fast


def tokens(batches: int, rows: int, length: int) -> list[Tensor]:
    """Batches [rows, length] of consecutive token ids."""
    ids = torch.tensor([i for text in sources() for i in tokenizer().encode(text)])
    assert len(ids) >= batches * rows * length
    return list(ids[: batches * rows * length].view(batches, rows, length))


class Examples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A map-style dataset over a list."""

    def __init__(self, rows: list[dict[str, object]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, object]:
        return self.rows[i]


def examples(count: int, length: int = 32, **more: object) -> Examples:
    """Causal-LM examples as transformers' Trainer wants them: input_ids and labels, the first four ignored."""
    rows = []
    for batch in tokens(count, 1, length):
        labels = batch[0].clone()
        labels[:4] = -100
        rows.append({"input_ids": batch[0], "labels": labels, **more})
    return Examples(rows)

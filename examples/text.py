"""Real text that every machine has, as tokens: the sources and documents of Python's standard library.

`load(vocab)` returns the same tokens on every call on one machine: the files are read in sorted order, a
byte-level BPE tokenizer of `vocab` entries is trained on them, and both results are kept in the user's cache
directory, under a key made of what they were made from. `Batches` cuts random windows out of the tokens.
This file must not know what is trained on the text.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers
import torch
from torch import Tensor
from tqdm import tqdm

SUFFIXES = (".py", ".txt", ".rst")
SKIPPED = {"__pycache__", "site-packages", "dist-packages", "lib-dynload"}
TRAIN_EVERY = 1
CHUNK = 64  # files encoded at a time


def files() -> list[Path]:
    """The text files of the standard library, sorted by their path inside it."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in SKIPPED]
        paths += [Path(folder, name) for name in names if name.endswith(SUFFIXES)]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def cache_directory() -> Path:
    """Where this user's caches live; `FUSEDHEAD_EXAMPLES_CACHE` names another place."""
    if named := os.environ.get("FUSEDHEAD_EXAMPLES_CACHE"):
        return Path(named)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fusedhead-examples"


def load(vocab: int) -> Tensor:
    """Tokens [T] int32 in [0, vocab) of the whole library, from the cache or made now."""
    corpus = files()
    tokens = cache_directory() / f"stdlib-{vocab}-{_fingerprint(corpus)}.pt"
    if not tokens.exists():
        tokenizer = train(vocab, corpus)
        _write(tokens, lambda path: torch.save(encode(tokenizer, corpus), path))
        _write(tokens.with_suffix(".json"), lambda path: tokenizer.save(str(path)))
    return torch.load(tokens, weights_only=True, mmap=True)


def train(vocab: int, corpus: list[Path]) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab` entries; deterministic, ties are broken by id."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    texts = tqdm(_texts(corpus), total=len(corpus), desc="read text, train the tokenizer", unit="file")
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, corpus: list[Path]) -> Tensor:
    """All files, one after the other, as int32 tokens [T]."""
    pieces = []
    with tqdm(total=len(corpus), desc="encode the text", unit="file") as bar:
        for start in range(0, len(corpus), CHUNK):
            chunk = corpus[start : start + CHUNK]
            for encoding in tokenizer.encode_batch(list(_texts(chunk))):
                pieces.append(torch.tensor(encoding.ids, dtype=torch.int32))
            bar.update(len(chunk))
    return torch.cat(pieces)


class Batches:
    """Random windows of the tokens: x, y [batch, length] int64, y one token ahead of x, fixed by the seed."""

    def __init__(self, tokens: Tensor, batch: int, length: int, seed: int, device: torch.device) -> None:
        self.tokens, self.batch, self.length, self.device = tokens, batch, length, device
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.tokens) - self.length - 1, (self.batch,), generator=self.generator)
        windows = torch.stack([self.tokens[s : s + self.length + 1] for s in starts.tolist()]).long()
        if self.device.type == "cuda":
            windows = windows.pin_memory().to(self.device, non_blocking=True)
        else:
            windows = windows.to(self.device)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _texts(corpus: list[Path]) -> Iterator[str]:
    return (path.read_text(encoding="utf-8", errors="replace") for path in corpus)


def _fingerprint(corpus: list[Path]) -> str:
    """Of all that the tokens depend on: the files' names and sizes, the library that cuts them, this file."""
    key = hashlib.sha256(f"{sys.version}\0{tokenizers.__version__}\0".encode() + Path(__file__).read_bytes())
    for path in corpus:
        key.update(f"{path}\0{path.stat().st_size}\0".encode())
    return key.hexdigest()[:16]


def _write(path: Path, save: Callable[[Path], object]) -> None:
    """Whole or not at all: two runs may make the same file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        save(unfinished)
        unfinished.replace(path)

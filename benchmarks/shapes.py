"""The sizes that are benchmarked: one `Case` is a shape and a dtype.

A case is written ``NxDxV`` or ``NxDxV:dtype`` on the command
line, or by the name of a family below.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """N tokens, D hidden, V vocabulary; h [N, D] and W [V, D] are of ``dtype``."""

    tokens: int
    hidden: int
    vocab: int
    dtype: str = "bfloat16"

    @property
    def text(self) -> str:
        return f"{self.tokens}x{self.hidden}x{self.vocab}:{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def gemm_flop(self) -> int:
        """Floating-point operations of one product with the logits' size: 2 N D V."""
        return 2 * self.tokens * self.hidden * self.vocab

    def logits_bytes(self) -> int:
        """Bytes of the logits in this dtype, which a fused head never builds."""
        return self.tokens * self.vocab * self.torch_dtype.itemsize


FAMILIES: dict[str, tuple[Case, ...]] = {
    # Heads of well-known models: Llama 3 8B, Gemma 2 2B, Qwen3 0.6B, GPT-2, Llama 3 70B, Llama 2, few tokens.
    "cuda": (
        Case(8192, 4096, 128256),
        Case(16384, 768, 50304),
        Case(8192, 1024, 151936),
        Case(8192, 2304, 256000),
        Case(4096, 8192, 128256),
        Case(2048, 4096, 32000),
        Case(512, 4096, 128256),
        Case(32768, 4096, 128256),
    ),
    "cpu": (
        Case(1024, 512, 32000, "float32"),
        Case(1024, 512, 32000, "bfloat16"),
        Case(2048, 768, 50304, "float32"),
    ),
    # One size grows, the other two stay: the curves of the plot.
    "tokens": tuple(Case(n, 2048, 131072) for n in (1024, 2048, 4096, 8192, 16384)),
    "vocab": tuple(Case(8192, 2048, v) for v in (32768, 65536, 131072, 262144)),
    "hidden": tuple(Case(8192, d, 131072) for d in (512, 1024, 2048, 4096, 8192)),
}


def parse(text: str) -> list[Case]:
    """Read a comma-joined list of cases and family names, each case once.

    Raises ValueError naming the part that is neither.
    """
    cases: list[Case] = []
    for part in text.split(","):
        if part in FAMILIES:
            cases += FAMILIES[part]
            continue
        sizes, _, dtype = part.partition(":")
        numbers = sizes.split("x")
        if len(numbers) != 3 or not all(n.isdecimal() for n in numbers):
            raise ValueError(f"{part!r} is neither NxDxV[:dtype] nor one of {', '.join(FAMILIES)}")
        if not isinstance(getattr(torch, dtype or "bfloat16", None), torch.dtype):
            raise ValueError(f"{dtype!r} is not a dtype of torch")
        tokens, hidden, vocab = map(int, numbers)
        cases.append(Case(tokens, hidden, vocab, dtype or "bfloat16"))
    return list(dict.fromkeys(cases))

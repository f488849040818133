"""The small models that several of the tests train."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from tests.e2e.text import VOCAB

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**more: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **IDS, **more}))

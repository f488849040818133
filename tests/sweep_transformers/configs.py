"""A tiny configuration of any transformers model: its own defaults with widths, depths and vocabularies shrunk by name.

Constructors fill in whatever follows from the sizes (layer types, per-layer lists), so only fields that have a number
of their own are given. What no rule by name gets right is a row of `SPECIAL`. This file builds no model.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

VOCAB = 1031  # a prime: no other extent of a tiny model is this number, so that it marks the vocabulary
HEADS = 4

# The first pattern that matches a whole field name decides: a value, or a function of the default.
RULES: tuple[tuple[str, Any], ...] = (
    (r"(text_|src_|tgt_|decoder_|speech_)?vocab_size", VOCAB),
    (r"moe_intermediate_size|expert_ffn_hidden_size|moe_shared_expert_intermediate_size", 32),
    (r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_dim|d_ff|dff|dim_ff|ffn_hidden_size|mlp_dim|feed_forward_size", 128),
    (r"(\w+_)?num_key_value_heads|num_kv_heads|multi_query_group_num", lambda d: HEADS if d >= 32 else 2),
    (r"linear_num_key_heads", 2),
    (r"(encoder_|decoder_|num_|speech_encoder_|cross_|num_self_|num_cross_|num_encoder_|num_decoder_|swa_num_)*"
     r"(attention_heads|heads|value_heads)|n_head|n_heads|mamba_n_heads|index_n_heads|linear_num_(value_)?heads", HEADS),
    (r"head_dim|d_kv|kv_channels|d_head|attention_head_(dim|size)|v_head_dim|qk_nope_head_dim|linear_\w*head_dim"
     r"|global_head_dim|swa_head_dim|cross_head_dim|index_head_dim", lambda d: d and 16),
    (r"qk_rope_head_dim|rotary_dim", lambda d: d and 8),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"(\w+_)?hidden_size(_global)?|d_model|n_embd|dim|(?!audio_|ple_|t2u_|spkr_|lang_|unit_|shape_)(\w+_)?embed_dim|hidden_dim"
     r"|emb_dim|embedding_size|projection_dim|output_dim|d_latents|word_embed_proj_dim|vision_output_dim|lru_width"
     r"|projector_(in|out)put_dim|output_proj_dims|input_embedding_size", 64),
    (r"num_hidden_layers|n_layers?|num_layers|num_(en|de)coder_layers|(\w+_)?(en|de)coder_layers|depth|num_blocks"
     r"|(\w+_)?num_hidden_layers|num_sparse_(en|de)coder_layers|[lrx]_layers", lambda d: min(d, 2)),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", lambda d: min(d, 4)),
    (r"num_experts_per_tok|moe_top_?k|moe_k|top_k_experts", lambda d: min(d, 2)),
    (r"n_group|topk_group", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", lambda d: min(d, 1)),
    (r"(max_position_embeddings|n_positions|max_(source|target)_positions|max_seq_len|n_ctx|position_embedding_size)",
     lambda d: min(d, 512)),
    (r"attention_window", 16),
    (r"(mamba_)?chunk_size", lambda d: min(d, 8) if d > 0 else d),
    (r"\w*(drop|dropout|jitter)\w*", lambda d: 0.0 if isinstance(d, float) else d),
    (r"use_cache", False),
)  # fmt: skip

# Fields by model type, for what the names do not tell.
SPECIAL: dict[str, dict[str, Any]] = {}

TOKEN = re.compile(r"\w*(token_id|token_index|_id|_index|_ids)")


class Tokens:
    """Token ids that do not fit into the small vocabulary, each given an id of its own at its upper end."""

    def __init__(self) -> None:
        self.given: dict[int, int] = {}

    def fit(self, token: int) -> int:
        if token < VOCAB:
            return token
        return self.given.setdefault(token, VOCAB - 1 - len(self.given))


def shrunk(name: str, default: Any, tokens: Tokens) -> Any:
    """The value for a field, or its default where nothing is to be done."""
    if isinstance(default, bool) and name != "use_cache":
        return default
    if TOKEN.fullmatch(name):
        if isinstance(default, int):
            return tokens.fit(default)
        if isinstance(default, (list, tuple)) and all(isinstance(t, int) for t in default):
            return type(default)(tokens.fit(t) for t in default)
        return default
    if not isinstance(default, (int, float)):
        return default
    for pattern, value in RULES:
        if re.fullmatch(pattern, name):
            return value(default) if callable(value) else value
    return default


def tiny(cls: type, default: Any = None, tokens: Tokens | None = None) -> Any:
    """A small configuration of class ``cls`` (of ``default``'s kind). Raises what the class raises."""
    tokens = tokens or Tokens()
    default = cls() if default is None else default
    subs = getattr(cls, "sub_configs", None) or {}
    given: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name, None)
        if field.name in subs:
            if value is not None and dataclasses.is_dataclass(value):
                given[field.name] = tiny(type(value), value, tokens)
        elif field.init and not derived(field):
            small = shrunk(field.name, value, tokens)
            if small != value:
                given[field.name] = small
    given |= SPECIAL.get(getattr(cls, "model_type", ""), {})
    return cls(**given)


def derived(field: dataclasses.Field[Any]) -> bool:
    """Whether the class works a field out of others where nothing is given."""
    return field.default is None and field.default_factory is dataclasses.MISSING

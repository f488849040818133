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
    (r"(text_|src_|tgt_|decoder_|speech_|t2u_)?vocab_size", VOCAB),
    (r"moe_intermediate_size|expert_ffn_hidden_size|moe_shared_expert_intermediate_size", 32),
    (r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_dim|d_ff|dff|dim_ff|ffn_hidden_size|mlp_dim|feed_forward_size", 128),
    (r"(\w+_)?num_key_value_heads|num_kv_heads|multi_query_group_num", lambda d: HEADS if d >= 32 else 2),
    (r"linear_num_key_heads", 2),
    (r"(encoder_|decoder_|num_|speech_encoder_|cross_|num_self_|num_cross_|num_encoder_|num_decoder_|swa_num_)*"
     r"(attention_heads|heads|value_heads)|n_heads?|mamba_n_heads|index_n_heads|linear_num_(value_)?heads", HEADS),
    (r"head_dim|d_kv|kv_channels|d_head|attention_head_(dim|size)|v_head_dim|qk_nope_head_dim|linear_\w*head_dim"
     r"|global_head_dim|swa_head_dim|cross_head_dim|index_head_dim", lambda d: d and 16),
    (r"qk_rope_head_dim|rotary_dim", lambda d: d and 8),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"(\w+_)?hidden_size(_global)?|d_model|n_embd|dim|(?!audio_|ple_|t2u_|spkr_|lang_|unit_|shape_)(\w+_)?embed_dim"
     r"|hidden_dim|emb_dim|embedding_size|projection_dim|output_dim|d_latents|word_embed_proj_dim|vision_output_dim|lru_width"
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


class Tiny(str):
    """In `SPECIAL`: a tiny configuration of this model type."""


def rope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


WIDE = {"vision_start_token_id": VOCAB - 20, "vision_end_token_id": VOCAB - 21}
MAMBA = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]}

# Fields by model type, configuration class or model class, for what the names do not tell.
SPECIAL: dict[str, dict[str, Any]] = {
    "step3p5": {"sliding_window": 16},
    "qwen2_5_omni_text": {"rope_parameters": rope(2, 3, 3)},
    "kosmos-2": {"latent_query_num": 4},
    "blip-2": {"image_token_id": VOCAB - 1, "num_query_tokens": 4},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "chameleon": {"vocabulary_map": {"<image>": VOCAB - 1, "IMGIMGABZ": VOCAB - 2, "IMGIMGACZ": VOCAB - 3}},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": rope(3, 3, 2), "sliding_attention": rope(3, 3, 2)},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": VOCAB - 1, "<|extra_200|>": VOCAB - 2}},
    "emu3_vqgan": {"base_channels": 32, "embed_dim": 16, "latent_channels": 16},
    "ernie4_5_vl_moe_text": {"rope_parameters": rope(3, 3, 2)},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 4},
    "florence_vision": {"embed_dim": [16] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4},
    "fun_asr_nano": {"adaptor_config": None},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "intermediate_size": 128, "activation_sparsity_pattern": [0.0] * 4, "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16, "laurel_rank": 16,
    },
    "gemma4_assistant": {"text_config": Tiny("gemma4_text")},
    "gemma4_unified_assistant": {"text_config": Tiny("gemma4_unified_text")},
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB},
    "glm46v_text": {"rope_parameters": rope(2, 3, 3)},
    "glm4_moe_lite": {"num_key_value_heads": HEADS},
    "glm4v_moe_text": {"rope_parameters": {**rope(2, 1, 1), "partial_rotary_factor": 0.5}},
    "glm4v_text": {"rope_parameters": rope(2, 3, 3)},
    "glm_image_text": {"rope_parameters": rope(2, 3, 3), "vision_vocab_size": VOCAB},
    "glm_ocr_text": {"rope_parameters": rope(2, 3, 3)},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "text_config": Tiny("granite4_vision_text"), "deepstack_layer_map": [(0, 0)], "downsample_rate": "1/2",
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": rope(2, 2, 2, 2)},
    "instructblip": {"image_token_index": VOCAB - 1, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": VOCAB - 1, "num_query_tokens": 4},
    "janus_vqgan": {"base_channels": 32, "embed_dim": 16, "latent_channels": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_key_value_heads": HEADS, "head_dim": 8},
    "luke": {"entity_vocab_size": 500},
    "mamba2": {"head_dim": 32, "n_groups": 2},
    "mimi": {"upsampling_ratios": [2, 2], "upsample_groups": 64},
    "ministral": {"head_dim": 16},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "musicgen": {
        "text_encoder": Tiny("t5"), "audio_encoder": Tiny("encodec"), "decoder": Tiny("musicgen_decoder"),
    },
    "musicgen_melody": {
        "text_encoder": Tiny("t5"), "audio_encoder": Tiny("encodec"), "decoder": Tiny("musicgen_melody_decoder"),
    },
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "paddleocr_vl_text": {"rope_parameters": rope(2, 3, 3)},
    "qwen2_5_omni_thinker": WIDE,
    "qwen2_5_vl_text": {"rope_parameters": rope(2, 3, 3)},
    "qwen2_vl_text": {"rope_parameters": rope(2, 3, 3)},
    "qwen3_omni_moe_thinker": WIDE,
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local", "lsh"]},
    "ReformerForMaskedLM": {"is_decoder": False},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "shape_vocab_size": 100},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4, "depths": [1] * 7, "hidden_size": 64},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "depths": [1] * 7, "hidden_size": 64},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 4, "depths": [1] * 7, "hidden_size": 64},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"num_key_value_heads": HEADS},
    "zamba": {**MAMBA, "num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3},
    "zamba2": MAMBA,
}  # fmt: skip

# Classes whose own `config_class` is that of the model around them.
CONFIGS = {"CsmDepthDecoderForCausalLM": "CsmDepthDecoderConfig"}

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


def of_class(cls: type) -> Any:
    """A small configuration for a transformers model class. Raises what the classes raise."""
    import transformers

    name = CONFIGS.get(cls.__name__)
    return tiny(getattr(transformers, name) if name else cls.config_class, model=cls.__name__)  # type: ignore[attr-defined]


def of_type(model_type: str, tokens: Tokens) -> Any:
    from transformers import CONFIG_MAPPING

    return tiny(CONFIG_MAPPING[model_type], tokens=tokens)


def tiny(cls: type, default: Any = None, tokens: Tokens | None = None, model: str = "") -> Any:
    """A small configuration of class ``cls`` (of ``default``'s kind)."""
    tokens = tokens or Tokens()
    if default is None:
        try:
            default = cls()
        except Exception:  # it has parts without which there is none
            default = cls
    subs = getattr(cls, "sub_configs", None) or {}
    inputs: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        try:
            value = getattr(default, field.name, None)
        except Exception:  # differs from layer to layer: the class knows how
            continue
        sections = value.get("mrope_section") if field.name == "rope_parameters" and isinstance(value, dict) else None
        if sections:
            inputs[field.name] = {**value, "mrope_section": thirds(value, inputs.get("head_dim") or 16)}
        elif field.name in subs:
            if value is not None and dataclasses.is_dataclass(value):
                inputs[field.name] = tiny(type(value), value, tokens)
        elif field.init and not derived(field):
            small = shrunk(field.name, value, tokens)
            if small != value:
                inputs[field.name] = small
    inputs |= SPECIAL.get(getattr(cls, "model_type", ""), {})
    inputs |= SPECIAL.get(cls.__name__, {}) | SPECIAL.get(model, {})
    inputs = {name: of_type(value, tokens) if isinstance(value, Tiny) else value for name, value in inputs.items()}
    result = cls(**inputs)
    if result.is_encoder_decoder:
        for name, token in (("decoder_start_token_id", 0), ("pad_token_id", 1)):
            if getattr(result, name, None) is None:
                setattr(result, name, token)
    return result


def thirds(rope: dict[str, Any], head_dim: int) -> list[int]:
    """Frequencies for time, height and width that add up to those of a small head."""
    all_of_them = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    side = 3 * all_of_them // 8
    return [all_of_them - 2 * side, side, side]


def derived(field: dataclasses.Field[Any]) -> bool:
    """Whether the class works a field out of others where nothing is given."""
    return field.default is None and field.default_factory is dataclasses.MISSING

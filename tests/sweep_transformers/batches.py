"""A small training batch for any transformers model, read off the signature of its ``forward``.

Text goes in as random token ids with labels; what a model needs beside or instead of text is a row of `EXTRA`.
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


def and_images(config: Any, batch: Batch) -> Batch:
    return {**batch, "pixel_values": images(config)}


def placeholders(config: Any, batch: Batch) -> Batch:
    """Images whose places in the text are marked by as many tokens as the model makes of an image."""
    names = ("image_token_index", "image_token_id", "video_token_index")
    token = next(getattr(config, name) for name in names if getattr(config, name, None))
    batch["input_ids"][:, : config.num_query_tokens] = token
    batch = and_images(config, batch)
    if config.model_type == "instructblipvideo":
        batch["input_ids"][:, : 4 * config.num_query_tokens] = token
        batch["pixel_values"] = batch["pixel_values"][:, None].expand(-1, 4, -1, -1, -1).contiguous()
    if config.model_type != "blip-2":
        batch["qformer_input_ids"] = ids(length=6)
    return batch


def kosmos(config: Any, batch: Batch) -> Batch:
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    mask[:, : config.latent_query_num] = True
    return {**and_images(config, batch), "image_embeds_position_mask": mask}


def by_codebook(config: Any, batch: Batch) -> Batch:
    """Musicgen's decoders: a row of ids for each codebook, labels in the last dimension."""
    books = config.num_codebooks
    return {"input_ids": ids(ROWS * books), "labels": torch.randint(LOW, HIGH, (ROWS, LENGTH, books))}


def musicgen(config: Any, batch: Batch) -> Batch:
    inner = by_codebook(config.decoder, {})
    return {"input_ids": ids(), "decoder_input_ids": inner["input_ids"], "labels": inner["labels"]}


def dia(config: Any, batch: Batch) -> Batch:
    books = config.decoder_config.num_channels
    decoder = torch.randint(LOW, HIGH, (ROWS, TARGETS, books))
    labels = torch.randint(LOW, HIGH, (ROWS * books, TARGETS))
    return {"input_ids": batch["input_ids"], "decoder_input_ids": decoder, "labels": labels}


def csm(config: Any, batch: Batch) -> Batch:
    codes = torch.randint(LOW, HIGH, (ROWS, LENGTH, config.num_codebooks))
    return {"input_ids": codes, "labels": codes.clone()} if hasattr(config, "depth_decoder_config") else {
        "input_ids": codes[:, 0], "labels": codes[:, 0].clone(),
        "backbone_last_hidden_state": torch.randn(ROWS, config.backbone_hidden_size),
    }  # fmt: skip


def moshi(config: Any, batch: Batch) -> Batch:
    if "labels" in batch:
        return batch
    codes = lambda: torch.randint(LOW, HIGH, (ROWS, config.num_codebooks, LENGTH))  # noqa: E731
    text = batch["input_ids"]
    return {"input_ids": text, "moshi_audio_codes": codes(), "user_audio_codes": codes(), "text_labels": text.clone()}


def spoken(frames: int, mels: int) -> Callable[[Any, Batch], Batch]:
    return lambda config, batch: {**batch, "input_features": torch.randn(ROWS, frames, mels)}


def kyutai(config: Any, batch: Batch) -> Batch:
    codes = torch.randint(LOW, HIGH, (ROWS, LENGTH, config.num_codebooks + 1))
    return {"input_ids": codes, "labels": codes[..., 0].clone()}


def lxmert(config: Any, batch: Batch) -> Batch:
    seen = {"visual_feats": torch.randn(ROWS, 4, config.visual_feat_dim), "visual_pos": torch.rand(ROWS, 4, 4)}
    return {**batch, **seen}


def visual_bert(config: Any, batch: Batch) -> Batch:
    seen = torch.randn(ROWS, 4, config.visual_embedding_dim)
    mask = torch.ones(ROWS, 4, dtype=torch.long)
    return {**batch, "visual_embeds": seen, "visual_attention_mask": mask, "labels": masked(ids(length=LENGTH + 4))}


def perceiver(config: Any, batch: Batch) -> Batch:
    length = config.max_position_embeddings
    return {"inputs": ids(length=length), "labels": masked(ids(length=length))}


# Whole batches by model type, for what a signature does not tell.
EXTRA: dict[str, Callable[[Any, Batch], Batch]] = {
    "blip-2": placeholders,
    "bridgetower": and_images,
    "canary": spoken(64, 80),
    "cohere_asr": spoken(64, 80),
    "csm": csm,
    "csm_depth_decoder_model": csm,
    "dia": dia,
    "fsmt": lambda config, made: {**made, "decoder_input_ids": ids(length=TARGETS)},
    "git": and_images,
    "instructblip": placeholders,
    "instructblipvideo": placeholders,
    "kosmos-2": kosmos,
    "kyutai_speech_to_text": kyutai,
    "lxmert": lxmert,
    "moshi": moshi,
    "musicgen": musicgen,
    "musicgen_decoder": by_codebook,
    "musicgen_melody": musicgen,
    "musicgen_melody_decoder": by_codebook,
    "perceiver": perceiver,
    "pp_formulanet": lambda config, made: {**made, "decoder_input_ids": ids(length=TARGETS)},
    "seamless_m4t": lambda config, made: {
        "inputs_embeds": torch.randn(ROWS, LENGTH, config.hidden_size), "labels": made["labels"],
    },
    "qwen2_5_omni_talker": lambda config, made: {
        **made, "thinker_reply_part": torch.randn(ROWS, LENGTH, config.embedding_size), "input_text_ids": ids(),
    },
    "qwen3_omni_moe_talker_code_predictor": lambda config, made: {**made, "generation_steps": 1},
    "voxtral_realtime": lambda config, made: {**made, "input_features": torch.randn(ROWS, 128, 8 * LENGTH)},
    "pix2struct": lambda config, made: {**made, "flattened_patches": torch.rand(ROWS, 16, 2 + 64)},
    "roc_bert": lambda config, made: {**made, "attack_input_ids": ids(), "labels_input_ids": masked(ids())},
    "speech_to_text": spoken(64, 80),
    "splinter": lambda config, made: {
        "input_ids": torch.where(torch.arange(LENGTH) == 3, config.question_token_id, ids()),
        "question_positions": torch.tensor([[3], [3]]),
        "start_positions": torch.tensor([[5], [6]]), "end_positions": torch.tensor([[7], [8]]),
    },
    "udop": lambda config, made: {**made, "bbox": torch.rand(ROWS, LENGTH, 4)},
    "vilt": and_images,
    "visual_bert": visual_bert,
}  # fmt: skip

# Main inputs other than text.
MAIN: dict[str, Callable[[Any], Tensor]] = {
    "pixel_values": images,
    "input_features": lambda c: torch.randn(
        ROWS, getattr(c, "num_mel_bins", 80), 2 * getattr(c, "max_source_positions", 64)
    ),
    "input_values": lambda c: torch.randn(ROWS, 4000),
    "flattened_patches": lambda c: torch.rand(ROWS, 16, 2 + 3 * 16 * 16),
}


def batch(model: nn.Module, name: str) -> Batch:
    """Keyword arguments of ``model`` (an instance of the class called ``name``), the same ones on every call."""
    torch.manual_seed(1)
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    inputs: Batch = {}
    if main in MAIN:
        inputs[main] = MAIN[main](config)
    if "input_ids" in parameters and (main not in MAIN or not config.is_encoder_decoder):
        inputs["input_ids"] = ids()
        inputs["attention_mask"] = torch.ones(ROWS, LENGTH, dtype=torch.long)
    if "labels" in parameters:
        if config.is_encoder_decoder:
            inputs["labels"] = ignored(ids(length=TARGETS))
        elif "MaskedLM" in name or "PreTraining" in name:
            inputs["labels"] = masked(ids())
        else:
            inputs["labels"] = ignored(inputs.get("input_ids", ids()))
    for second in ("next_sentence_label", "sentence_order_label"):
        if second in parameters:
            inputs[second] = torch.tensor([0, 1])
    inputs = {key: value for key, value in inputs.items() if key in parameters}
    return EXTRA.get(config.model_type, lambda config, inputs: inputs)(config, inputs)

"""PEFT: adapters with the head frozen, and with the head trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.e2e.comparison import Trained, check, weights
from tests.e2e.models import llama
from tests.e2e.text import tokens

WAYS = {
    "the head is frozen": {"target_modules": ["q_proj", "v_proj"]},
    "the head is saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "the head has an adapter": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_lora(way: str) -> None:
    def program(compiled: bool) -> Trained:
        settings: dict[str, Any] = {"r": 4, "lora_dropout": 0.0, "init_lora_weights": "gaussian", **WAYS[way]}
        model = get_peft_model(llama(), LoraConfig(**settings))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        before, logged = weights(model), {}
        run = torch.compile(model) if compiled else model
        for step, batch in enumerate(tokens(4, 4, 32)):
            loss = run(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logged[f"loss {step}"] = float(loss)
        return Trained(logged, before, weights(model))

    check(program, heads=0 if "adapter" in way else 1)

"""accelerate's bare loop: gradient accumulation, mixed precision, and a model it compiles itself."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader

from tests.e2e.comparison import BFLOAT16, FLOAT32, Trained, check, weights
from tests.e2e.models import llama
from tests.e2e.text import examples


@pytest.mark.parametrize(("precision", "slack"), [("no", FLOAT32), ("bf16", BFLOAT16)])
def test_a_bare_loop(precision: str, slack: float) -> None:
    def program(compiled: bool) -> Trained:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=2,
            mixed_precision=precision,
            dynamo_backend="inductor" if compiled else "no",
        )
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        loader = DataLoader(examples(24), batch_size=4, shuffle=True)  # type: ignore[arg-type]
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        before, logged = weights(model), {}
        for step, batch in enumerate(loader):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    logged[f"norm {step}"] = float(accelerator.clip_grad_norm_(model.parameters(), 1.0))
                optimizer.step()
                optimizer.zero_grad()
            logged[f"loss {step}"] = float(loss)
        return Trained(logged, before, weights(model))

    check(program, heads=1, slack=slack)

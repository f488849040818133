"""A bare loop of accelerate under FSDP2, with a Llama of transformers."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from tests.e2e.models import llama
from tests.e2e.on_ranks import fsdp2_on_cpu
from tests.e2e.on_ranks.arguments import LENGTH, ROWS, STEPS, finish, mine, start
from tests.e2e.text import tokens


def main() -> None:
    start()
    fsdp2_on_cpu.allow()
    accelerator = Accelerator(cpu=True)
    model = llama()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3))
    losses = []
    for batch in mine(tokens(STEPS, ROWS, LENGTH)):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    finish(losses)


if __name__ == "__main__":
    main()

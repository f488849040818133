"""litgpt's pretraining loop: the model is compiled, its chunked cross-entropy is not."""

from __future__ import annotations

import lightning
import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy

from tests.e2e.comparison import Trained, check, weights
from tests.e2e.text import VOCAB, tokens


def test_pretraining() -> None:
    def program(compiled: bool) -> Trained:
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        config = Config(n_layer=1, n_head=2, n_embd=64, block_size=64, padded_vocab_size=VOCAB, vocab_size=VOCAB)
        model = GPT(config)
        before, logged = weights(model), {}
        run = fabric.setup(torch.compile(model) if compiled else model)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(run.parameters(), 1e-3))
        for step, batch in enumerate(tokens(4, 8, 33)):
            accumulating = step % 2 == 0
            with fabric.no_backward_sync(run, enabled=accumulating):
                logits = run(batch[:, :-1].contiguous())
                loss = chunked_cross_entropy(logits, batch[:, 1:].contiguous())
                fabric.backward(loss / 2)
            logged[f"loss {step}"] = float(loss)
            if not accumulating:
                fabric.clip_gradients(run, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
        return Trained(logged, before, weights(model))

    check(program, heads=1)

"""x-transformers: its cross-entropy masks the target out of the logits, which takes a token program."""

from __future__ import annotations

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from tests.e2e.comparison import Trained, check, weights
from tests.e2e.text import VOCAB, tokens


def test_the_autoregressive_wrapper() -> None:
    def program(compiled: bool) -> Trained:
        layers = Decoder(dim=64, depth=1, heads=2, attn_dim_head=32)
        model = AutoregressiveWrapper(TransformerWrapper(num_tokens=VOCAB, max_seq_len=64, attn_layers=layers))
        run = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        before, logged = weights(model), {}
        for step, batch in enumerate(tokens(4, 4, 33)):
            loss = run(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logged[f"loss {step}"] = float(loss)
        return Trained(logged, before, weights(model))

    check(program, heads=1)

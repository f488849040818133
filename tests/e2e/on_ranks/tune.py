"""torchtune's full-finetune recipe: layers and loss compiled, the model sharded by its own function, the head eager.

``tied`` as a second word: a model whose head is its embedding (Qwen 2), which torchtune multiplies by itself.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

import tests.e2e.apart.conftest  # noqa: F401  torchvision, which torchtune imports, beside a CPU build of torch

# isort: split
from torchtune.models.llama3 import llama3
from torchtune.models.qwen2 import qwen2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.training import compile_loss, compile_model, get_shard_conditions, shard_model

from tests.e2e.on_ranks.arguments import LENGTH, ROWS, STEPS, finish, mine, start
from tests.e2e.text import VOCAB, tokens

SIZES = {"vocab_size": VOCAB, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 64, "max_seq_len": 64}


def main() -> None:
    start()
    tied = "tied" in sys.argv
    model = qwen2(**SIZES, intermediate_dim=128, tie_word_embeddings=True) if tied else llama3(**SIZES)
    loss_of = CEWithChunkedOutputLoss(num_output_chunks=2)
    compile_loss(loss_of, verbose=False)
    compile_model(model, verbose=False)
    model.set_num_output_chunks(loss_of.num_output_chunks)
    condition = partial(get_shard_conditions, names_to_match=None)
    shard_model(model=model, shard_conditions=[condition], cpu_offload=False, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for batch in mine(tokens(STEPS, ROWS, LENGTH)):
        loss = loss_of(model(batch[:, :-1]), batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    finish(losses)


if __name__ == "__main__":
    main()

"""DistributedDataParallel: DDPOptimizer cuts the graph before the backend sees it; head and loss stay together."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import json, os, torch, torch.nn.functional as F, torch.distributed as dist
from torch import nn
from fusedhead import observe
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
torch.manual_seed(0)
V, D = 2048, 256

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, x, y):
        h = self.embed(x)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        logits = self.head(h)
        return logits, F.cross_entropy(logits.view(-1, V), y.view(-1))

reports = []
observe.add(reports.append)
model, x = Model(), torch.randint(0, V, (2, 8))
expected = model(x, x)[1]
expected.backward()
gradient = model.head.weight.grad.clone()
model.zero_grad()
compiled = torch.compile(nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1), backend="fusedhead")
loss = compiled(x, x)[1]
loss.backward()
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(model.head.weight.grad, gradient, atol=1e-6, rtol=1e-5)
print(json.dumps({"graphs": len(reports), "fused": sum(h.fused for r in reports for h in r.heads)}))
dist.destroy_process_group()
"""


def test_a_head_under_ddp_is_fused_and_its_gradients_are_right() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '{"graphs": 3, "fused": 1}'

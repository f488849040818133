"""DistributedDataParallel, whose optimizer cuts the graph before the backend sees it, and FSDP, which frees weights.

Both are about the graphs that the backend is given and the gradients that come back, so AOTAutograd runs what the pass
made of them; tests/run/test_cli.py has ranks that run Inductor's code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fusedhead.deferred.reasons import BuiltAtOnce

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, torch, torch.nn.functional as F, torch.distributed as dist
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from tests.eager_stack import backend
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
model, x = Model(), torch.randint(0, V, (2, 8))
expected = model(x, x)[1]
expected.backward()
gradient = model.head.weight.grad.clone()
model.zero_grad()
parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
compiled = torch.compile(parallel, backend=backend(reports.append, aot_eager))
loss = compiled(x, x)[1]
loss.backward()
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(model.head.weight.grad, gradient, atol=1e-6, rtol=1e-5)
print(json.dumps({"graphs": len(reports), "fused": sum(h.fused for r in reports for h in r.heads)}))
dist.destroy_process_group()
"""


def test_a_head_under_ddp_is_fused_and_its_gradients_are_right() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '{"graphs": 3, "fused": 1}'


SHARDED = """
import json, torch, torch.nn.functional as F, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch._dynamo.backends.debugging import aot_eager
from tests.eager_stack import backend
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
V, D = 2048, 64

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(D, V, bias=False)

    def forward(self, h, y=None):
        logits = self.project(torch.tanh(h))
        return logits if y is None else F.cross_entropy(logits, y)

reports, losses = [], {}
backends = {"eager": "eager", "fusedhead": backend(reports.append, aot_eager)}
h, y = torch.randn(8, D), torch.randint(0, V, (8,))
for name in backends:
    for within in (False, True):
        torch.manual_seed(0)
        model = Head()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
        model.compile(backend=backends[name])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(2):
            loss = model(h, y) if within else F.cross_entropy(model(h), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name, within] = loss
for within in (False, True):
    torch.testing.assert_close(losses["fusedhead", within], losses["eager", within])
heads = [head for report in reports for head in report.heads]
print(json.dumps([[head.fused, head.reason, [why for why, _ in head.run.at_once.items()]] for head in heads]))
dist.destroy_process_group()
"""


def test_what_fsdp_frees_is_not_read_later_where_a_copy_does_not_pay_and_a_loss_in_the_graph_is_fused() -> None:
    done = subprocess.run([sys.executable, "-c", SHARDED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[True, "", [BuiltAtOnce.LARGE_COPY.template]], [True, "", []]]

"""What the compiled step of a head runs besides the head: of few tokens, every kernel and saved tensor counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_fw_bw_and_get_code

from fusedhead.inductor import config

N, D, V = 40, 8, 64


def mean(h, w, y):
    return F.cross_entropy(F.linear(h, w).float(), y)


def smoothed(h, w, y):
    return F.cross_entropy(F.linear(h, w).float(), y, label_smoothing=0.1)


def weighted_by_token(h, w, y):
    losses = F.cross_entropy(F.linear(h, w).float(), y, reduction="none")
    return (losses * (y > 5)).sum() / 7


def with_squares_of_lse(h, w, y):
    z = F.linear(h, w).float()
    return F.cross_entropy(z, y) + 1e-4 * z.logsumexp(-1).square().mean()


def code(program):
    """The code of forward and backward."""
    h, w = (torch.randn(n, D, dtype=torch.bfloat16, requires_grad=True) for n in (N, V))
    y = torch.randint(0, V, (N,))
    _, result = run_fw_bw_and_get_code(lambda: torch.compile(program, backend="fusedhead")(h, w, y))
    return result


@pytest.mark.parametrize("program", [mean, smoothed, weighted_by_token, with_squares_of_lse])
def test_the_backward_scales_what_the_forward_found_and_runs_nothing_else(program):
    forward, backward = code(program)
    assert forward.count("torch.ops.fusedhead.head_loss_traced.default(") == 1
    assert backward.count("torch.ops.fusedhead.scale_.default(") == 1
    assert "cpp_fused" not in backward
    assert "tangents_1 = args" in backward
    saved = backward.split(" = args")[0].rsplit("\n", 1)[-1].strip()
    assert saved.count(",") == 2, saved  # dh, dw, and the gradient of the loss


def test_the_log_and_the_trace_have_inductors_graph_after_each_pass_that_changed_it(monkeypatch, caplog):
    graph = torch.fx.Graph()
    x, g = graph.placeholder("x"), graph.placeholder("g")
    graph.output(graph.call_function(torch.ops.fusedhead.head_stats.default, (x, g)))
    artifacts = {}
    monkeypatch.setattr(config, "trace_artifact", lambda name, text: artifacts.update({name: text()}))
    with caplog.at_level("DEBUG", "fusedhead"):
        config.own_passes(graph)
        config.own_passes(graph)  # nothing is left to change
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("after call-below-autograd (")
    assert "head_stats_traced" in message
    assert list(artifacts) == ["fusedhead_after_call-below-autograd"]
    assert "head_stats_traced" in artifacts["fusedhead_after_call-below-autograd"]

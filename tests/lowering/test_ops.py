"""The ops as torch sees them: opcheck, compiled and dynamic graphs, frozen operands, and no sizes specialised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fusedhead.kernels.contract import DIFFERENTIABLE_STATS, SAVED_STATS, STATS
from fusedhead.lowering.cache_key import source_hash, sources
from fusedhead.lowering.ops import SCHEMAS
from tests.lowering.heads import ALL, OPS, leaves, opcheck, operands


@pytest.mark.parametrize("wanted", ["", "h w", "h", "w", "h w cols rows"])
@pytest.mark.parametrize("labels", [0, 1])
def test_opcheck_finds_nothing_in_head_stats(wanted, labels):
    o = leaves(operands(7, 50, 8, labels, dtype=torch.float32), wanted)
    transform = "mulrow:0 tanh mulcol:1" if "cols" in wanted else ""
    for stats in ("lse,picked", "argmax", "lse,picked,sum,entropy,max", "variance"):
        opcheck(OPS.head_stats.default, (*o, transform, stats, 0))


@pytest.mark.parametrize("wanted", ["", "h w", "w"])
@pytest.mark.parametrize("labels", [0, 3])
def test_opcheck_finds_nothing_in_head_loss(wanted, labels):
    o = leaves(operands(7, 50, 8, labels, dtype=torch.float32), wanted)
    c, e = torch.ones(7), torch.empty(0)
    needs = ("h" in wanted, "w" in wanted, False, False)
    arguments = (*o, c, torch.ones(7, labels), e, c, "", "lse,picked", 0, *needs)
    opcheck(OPS.head_loss.default, arguments)


def test_opcheck_finds_nothing_in_the_backward():
    o = operands(7, 50, 8, dtype=torch.float32)
    saved = dict(zip(STATS, OPS.head_stats(*o, "", "lse,variance", 0)))
    g, e = torch.ones(7), torch.empty(0)
    for upstream in ((g, g[:, None], e, e, e), (g, e, g, g, e), (e, e, e, e, g)):
        arguments = (*upstream, *o, *(saved[name] for name in SAVED_STATS), "", 0, True, True, True, True)
        opcheck(OPS.head_stats_backward.default, arguments)


def test_the_schemas_are_functional_and_positional():
    for name in SCHEMAS:
        schema = getattr(OPS, name).default._schema
        assert not schema.is_mutable
        assert not any(a.kwarg_only for a in schema.arguments)


def fused(h, w, y):
    e = h.new_empty(0, dtype=torch.float32)
    lse, picked, *_ = OPS.head_stats(h, w, y[:, None], e, e, e, "", "lse,picked", 0)
    return (lse - picked[:, 0]).mean()


def fused_at_once(h, w, y):
    e = h.new_empty(0, dtype=torch.float32)
    c = torch.full_like(h[:, 0], 1 / 10, dtype=torch.float32)
    got = OPS.head_loss(
        h, w, y[:, None], e, e, e, c, -c[:, None], e, e, "", "lse,picked", 0, True, h is not w, False, False
    )
    return ((got[0] - got[1][:, 0]) * c).sum() * 10 / h.shape[0]


@pytest.mark.parametrize("program", [fused, fused_at_once])
def test_one_compiled_graph_serves_every_token_count(program):
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return torch._inductor.compile(gm, inputs)

    step = torch.compile(program, backend=backend, dynamic=True)
    for n in (7, 11, 252):
        o = leaves(operands(n, 507, 23, dtype=torch.float32), "h w")
        loss = step(o.h, o.w, o.y[:, 0])
        loss.backward()
        true = F.cross_entropy(o.h @ o.w.T, o.y[:, 0])
        torch.testing.assert_close(loss, true)
        for mine, its in zip((o.h.grad, o.w.grad), torch.autograd.grad(true, (o.h, o.w))):
            torch.testing.assert_close(mine, its)
    assert len(graphs) == 1


def test_a_graph_without_gradients_compiles_and_agrees():
    o = operands(30, 507, 23, dtype=torch.float32)
    with torch.no_grad():
        got = torch.compile(fused)(o.h, o.w, o.y[:, 0])
    torch.testing.assert_close(got, F.cross_entropy(o.h @ o.w.T, o.y[:, 0]))


def test_an_upstream_gradient_that_never_comes_runs_no_backward():
    o = leaves(operands(7, 50, 8), "h w")
    results = OPS.head_stats(*o, "", ",".join(STATS), 0)
    assert {name for name, x in zip(STATS, results) if x.requires_grad} == set(DIFFERENTIABLE_STATS)
    assert not results[-1].requires_grad


def test_gradients_agree_with_finite_differences():
    o = leaves(operands(4, 9, 3, 2), "h w cols rows")

    def stats(h, w, cols, rows):
        return OPS.head_stats(h, w, o.y, cols, rows, o.u, "mulrow:0 addcol:0 tanh mulcol:1", ALL, 0)[:4]

    assert torch.autograd.gradcheck(stats, (o.h, o.w, o.cols, o.rows))


def test_the_source_hash_is_stable_and_covers_every_source_file():
    assert len(source_hash()) == 32
    assert source_hash() is source_hash()
    named = {name.removeprefix("fusedhead").lstrip("./") for name, _ in sources()}
    root = Path(__file__).parents[2]
    wanted = {f"{f.relative_to(root / 'fusion_pass')}" for f in (root / "fusion_pass").rglob("*.py")}
    below = [f for folder in ("lowering", "kernels") for f in (root / folder).rglob("*")]
    wanted |= {f"{f.relative_to(root)}" for f in below if f.suffix in (".py", ".cpp", ".h")}
    assert named == wanted

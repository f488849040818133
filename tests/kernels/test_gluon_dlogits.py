"""Gradients of the logits by two warpgroups, run on the CPU: their numbers, with and without a part of the lse."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
gluon = pytest.importorskip("triton.experimental.gluon", reason="pairs are written in Gluon")

from gluon_on_cpu import Descriptor, on_cpu, run  # noqa: E402

from fusedhead.kernels.triton_engine.gluon import dlogits  # noqa: E402
from fusedhead.kernels.triton_engine.rows.label_map import map_labels  # noqa: E402
from tests.kernels.pairs import MODULES, SHAPES, made, swept  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # rows past the end


@pytest.mark.parametrize(("n", "v", "d", "group", "stages", "k"), SHAPES)
@pytest.mark.parametrize("of_lse", [True, False])
def test_gradients_of_the_logits(n, v, d, group, stages, k, of_lse):
    head = made(n, v, d, k)
    s, bound, programs = swept("dlogits", head, group, stages)
    z = head.h.float() @ head.w.float().t()
    lse, g, g_picked = z.logsumexp(1), torch.linspace(-1, 1, n), torch.randn(n, k)
    y, first = head.y + 40, 40  # columns of the whole vocabulary, of which the window begins at 40
    window = torch.full((n, v), float("nan"), dtype=torch.bfloat16)
    labels = map_labels(s, y, first) if k else y
    with on_cpu(*MODULES):
        of = (Descriptor(head.h), Descriptor(head.w), Descriptor(window))
        rest = (y, labels, g, g_picked, lse, first)
        run(dlogits.dlogits_pair_kernel, programs, (*of, *rest), bound | {"HAS_LSE": of_lse})
    dz = (z - lse[:, None]).exp() * g[:, None] if of_lse else torch.zeros_like(z)
    dz = dz.scatter_add(1, head.y, g_picked)
    assert torch.allclose(window.float(), dz, rtol=2**-8, atol=1e-6)

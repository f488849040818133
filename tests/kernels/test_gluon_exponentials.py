"""Exponentials by two warpgroups, run on the CPU: their numbers, and which token blocks are swept again."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
gluon = pytest.importorskip("triton.experimental.gluon", reason="pairs are written in Gluon")

from gluon_on_cpu import Descriptor, on_cpu, run  # noqa: E402

from fusedhead.kernels.triton_engine.gluon import exponentials  # noqa: E402
from fusedhead.kernels.triton_engine.rows.label_map import map_labels  # noqa: E402
from tests.kernels.pairs import MODULES, SHAPES, made, swept  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # rows past the end

L2E = 1.4426950408889634


@pytest.mark.parametrize(("n", "v", "d", "group", "stages", "k"), SHAPES)
def test_exponentials_their_sums_and_the_labels_logits(n, v, d, group, stages, k):
    head = made(n, v, d, k)
    s, bound, programs = swept("exp", head, group, stages)
    window, ref2 = torch.full((n, v), float("nan"), dtype=torch.bfloat16), torch.linspace(-2, 2, n)
    picked, part = torch.full((n, k), float("nan")), torch.full((s.schedule.size,), float("nan"))
    labels = map_labels(s, head.y) if k else head.y
    with on_cpu(*MODULES):
        of = (Descriptor(head.h), Descriptor(head.w), Descriptor(window))
        rest = (head.y, labels, head.y, ref2, picked, part)
        run(exponentials.exp_pair_kernel, programs, (*of, *rest), bound)
    z = head.h.float() @ head.w.float().t()
    e = torch.exp2(z * L2E - ref2[:, None])
    assert torch.allclose(window.float(), e, rtol=2**-8, atol=0)
    assert torch.allclose(picked, z.gather(1, head.y), atol=1e-5)
    padding = s.schedule.blocks * 128 - n  # rows past the end count as logits of zero relative to nothing
    assert part.sum().item() == pytest.approx(e.double().sum().item() + padding * v, rel=1e-5)


def test_only_marked_token_blocks_are_done_again():
    n, v, d, group = 700, 600, 130, 4
    head = made(n, v, d, 1)
    s, bound, programs = swept("exp", head, group, 4)
    marked = torch.tensor([0, 1, 0, 0, 1, 1], dtype=torch.int32)
    window, ref2 = torch.full((n, v), float("nan"), dtype=torch.bfloat16), torch.zeros(n)
    picked, part = torch.full((n, 1), float("nan")), torch.full((s.schedule.size,), float("nan"))
    for flags in (marked, torch.zeros_like(marked)):
        with on_cpu(*MODULES):
            of = (Descriptor(head.h), Descriptor(head.w), Descriptor(window))
            rest = (head.y, map_labels(s, head.y), flags, ref2, picked, part)
            run(exponentials.exp_pair_kernel, programs, (*of, *rest), bound | {"ONLY": True})
    there = marked.repeat_interleave(128)[:n].bool()
    e = torch.exp2((head.h.float() @ head.w.float().t()) * L2E)
    assert torch.allclose(window[there].float(), e[there], rtol=2**-8, atol=0)
    assert window[~there].isnan().all()
    assert picked.isnan().squeeze(1).equal(~there)

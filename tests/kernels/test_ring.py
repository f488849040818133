"""The kernels of two groups of warps, run on the CPU: numbers, order of work, nothing given away early.

test_kernels_compile.py compiles them; tests/gpu and benchmarks/gpu_check.py run them on the chip.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
gluon = pytest.importorskip("triton.experimental.gluon", reason="pairs are written in Gluon")

from gluon_on_cpu import Descriptor, on_cpu, run  # noqa: E402

from fusedhead.kernels.triton_engine.gluon import statistics  # noqa: E402
from fusedhead.kernels.triton_engine.rows.label_map import map_labels  # noqa: E402
from fusedhead.kernels.triton_engine.rows.merge import merge_statistics  # noqa: E402
from tests.kernels.pairs import MODULES, SHAPES, made, swept  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # rows past the end


@pytest.mark.parametrize(("n", "v", "d", "group", "stages", "k"), SHAPES)
def test_row_statistics(n, v, d, group, stages, k):
    head = made(n, v, d, k)._replace(h=made(n, v, d, k).h * 20)  # logits of which a running maximum is needed
    s, bound, programs = swept("stream", head, group, stages)
    picked, part = torch.full((n, k), float("nan")), torch.full((2, s.schedule.size), float("nan"))
    labels = map_labels(s, head.y) if k else head.y
    with on_cpu(*MODULES):
        rest = (head.y, labels, head.y, picked, part)
        run(statistics.stream_pair_kernel, programs, (Descriptor(head.h), Descriptor(head.w), *rest), bound)
    z = head.h.float() @ head.w.float().t()
    lse = merge_statistics(s, part, part, frozenset({"lse"}))["lse"]
    assert torch.allclose(lse, z.logsumexp(1), atol=1e-4)
    assert torch.allclose(picked, z.gather(1, head.y), atol=1e-4)

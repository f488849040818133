"""The kernels of two groups of warps, run on the CPU: numbers, order of work, nothing given away early.

test_kernels_compile.py compiles them; tests/gpu and benchmarks/gpu_check.py run them on the chip.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
gluon = pytest.importorskip("triton.experimental.gluon", reason="pairs are written in Gluon")

from gluon_on_cpu import Descriptor, on_cpu, run  # noqa: E402

from fusedhead.kernels.contract import Head  # noqa: E402
from fusedhead.kernels.transform.transform import parse  # noqa: E402
from fusedhead.kernels.triton_engine.device import rows, schedule  # noqa: E402
from fusedhead.kernels.triton_engine.gluon import (  # noqa: E402
    dlogits,
    exponentials,
    ring,
    statistics,
    tile,
)
from fusedhead.kernels.triton_engine.launch.sweep import Sweep, sweep  # noqa: E402
from fusedhead.kernels.triton_engine.launch.tiles import Tile  # noqa: E402
from fusedhead.kernels.triton_engine.rows.label_map import map_labels  # noqa: E402
from fusedhead.kernels.triton_engine.rows.merge import merge_statistics  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # rows past the end
MODULES = (ring, tile, exponentials, statistics, dlogits, rows, schedule)
L2E = 1.4426950408889634
SHAPES = (  # tokens, vocabulary, hidden, token blocks side by side, stages, labels
    (200, 500, 200, 1, 4, 1),  # a tile and a token block that are not whole, a step over D too
    (300, 1152, 64, 3, 2, 1),  # one step over D; whole tiles
    (700, 600, 130, 4, 3, 3),  # token blocks that do not fill a group
    (90, 200, 100, 1, 4, 0),  # fewer tiles than groups of warps
)


def made(n: int, v: int, d: int, k: int) -> Head:
    draw = torch.Generator().manual_seed(n)
    h, w = (torch.randn(m, d, generator=draw).to(torch.bfloat16) for m in (n, v))
    y = torch.randint(0, v, (n, k), generator=draw)
    nothing = torch.empty(0)
    return Head(h, w / d**0.5, y, nothing[None], nothing[None], nothing, parse(""))


def swept(kernel: str, head: Head, group: int, stages: int) -> tuple[Sweep, dict[str, object], int]:
    """The sweep in pairs, the arguments that it binds, its programs."""
    s = sweep(kernel, head, tile=Tile(128, 192, 64, group, 4, stages, False, 3, 2, True))
    return s, s.arguments(STAGES=stages, ONLY=False), -(-s.schedule.programs // 2)


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

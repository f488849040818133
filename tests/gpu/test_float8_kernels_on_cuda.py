"""The kernels of float8 gradients on a GPU, each against torch's own ops: what an interpreter cannot show of them.

The interpreter multiplies and rounds as a CPU does, and Gluon kernels do not run in it. What is compared here comes
from the chip: rounding to e4m3, marks, the order of bytes in memory, products of tensor cores, sums in pieces.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedhead.kernels import self_check
from fusedhead.kernels.chips import TESTED
from fusedhead.kernels.contract import Head, RowGrads, Windows
from fusedhead.kernels.transform.transform import Transform
from fusedhead.kernels.triton_engine.float8 import class_gradients, list_entries, quantize, single_pass
from fusedhead.kernels.triton_engine.float8.exponentials import Tail, float8_exponentials, padded
from fusedhead.kernels.triton_engine.float8.level import row_levels
from fusedhead.kernels.triton_engine.float8.products import float8_product
from fusedhead.kernels.triton_engine.launch.sweep import Sweep, sweep
from fusedhead.kernels.triton_engine.rows.label_map import map_labels
from tests.kernels.float8_sweep import classes_in_order, row_totals, tokens_in_order

pytestmark = pytest.mark.skipif(
    torch.cuda.get_device_capability()[0] not in TESTED, reason="float8 gradients have kernels for Hopper alone"
)
F8, BF16, L = torch.float8_e4m3fn, torch.bfloat16, 1.4426950408889634
MARK, TOP = 0x80, 432.0  # the byte of -0, and the least number that is marked
NEAR = 1e-3  # the relative distance to TOP at which the last bits of a logit may decide
ON = "cuda"
ONES = 700  # classes of one entry
SHAPES = (  # tokens, vocabulary, hidden: 16 groups of token blocks, tiles and blocks that are not whole, few tokens
    (2300, 32100, 256),
    (1024, 50304, 768),
    (300, 9000, 208),
)


@pytest.fixture(autouse=True, scope="module")
def _served():
    self_check.decide("pairs", torch.device("cuda", torch.cuda.current_device()), True)


def made(n: int, v: int, d: int, labels: int = 1) -> Head:
    """Logits of standard deviation 3, so that rows have entries above the threshold; a NaN row, frequent labels."""
    draw = torch.Generator(ON).manual_seed(n)
    h, w = (torch.randn(m, d, generator=draw, device=ON) for m in (n, v))
    y = (torch.rand(n, labels, generator=draw, device=ON) ** 4 * v).long()
    nothing = torch.empty(0, device=ON)
    h[5] = float("nan")
    return Head(h.to(BF16), (3 * w / d**0.5).to(BF16), y, nothing[None], nothing[None], nothing, Transform())


def there(order: Callable[[int], Tensor], count: int) -> Tensor:
    return order(count).to(ON)


def stored(head: Head, value: int = 0x38) -> Tail:
    """A tail with the same byte everywhere."""
    n, v = len(head.h), len(head.w)
    shapes = (padded(n, 128), padded(v, 64)), (padded(v, 64), padded(n, 128))
    rows, columns = (torch.full(shape, value, dtype=torch.uint8, device=ON).view(F8) for shape in shapes)
    return Tail(rows, columns, torch.full((n, -(-v // 192)), 0, dtype=torch.uint8, device=ON))


def run(
    head: Head, ref2: Tensor, gain: Tensor, tail: Tail, flags: Tensor | None = None
) -> tuple[Sweep, Tensor, Tensor]:
    s = sweep("exp8", head)
    picked = torch.zeros(head.y.shape, device=ON)
    part = torch.zeros(1, s.schedule.size, device=ON)
    float8_exponentials(s, head, tail, ref2, gain, picked, part, map_labels(s, head.y) if s.labels else None, flags)
    return s, picked, part


def references(head: Head, z: Tensor) -> tuple[Tensor, Tensor]:
    """References near the largest logit of a row, and gains that mark from none to a tenth of a row's entries."""
    n = len(head.h)
    ref2 = z.nan_to_num(0).amax(1) * L - torch.linspace(0, 6, n, device=ON)
    return ref2, torch.logspace(0.5, 4.4, n, device=ON)


def in_order(tail: Tail, n: int, v: int) -> tuple[Tensor, Tensor]:
    """The bytes of E8 and E8T as [N, V], classes and tokens as they are counted."""
    rows, columns = tail.rows.view(torch.uint8), tail.columns.view(torch.uint8)
    by_rows, by_columns = torch.empty_like(rows), torch.empty_like(columns)
    by_rows[:, there(classes_in_order, v)] = rows
    by_columns[:, there(tokens_in_order, n)] = columns
    return by_rows[:n, :v], by_columns[:v, :n].t()


@pytest.mark.parametrize(("n", "v", "d"), SHAPES)
@pytest.mark.parametrize("labels", [1, 0])
def test_the_sweep_stores_what_torch_rounds_and_marks_the_rest(n, v, d, labels):
    head = made(n, v, d, labels)
    z = head.h.float() @ head.w.float().t()
    ref2, gain = references(head, z)
    tail = stored(head)
    s, picked, part = run(head, ref2, gain, tail)
    by_rows, by_columns = in_order(tail, n, v)
    assert torch.equal(by_rows, by_columns)
    e = (z.double() * L - ref2.double()[:, None]).exp2()
    x = e * gain.double()[:, None]
    marked = by_rows == MARK
    large = ~(x < TOP)  # NaN too
    near = (x - TOP).abs() < NEAR * TOP
    assert torch.equal(marked | near, large | near)
    assert marked[5].all()
    assert 0.0001 < marked[6:].float().mean() < 0.1
    kept = ~marked & ~near
    want = x.where(kept, 0.0).float().to(F8).view(torch.uint8)
    steps = (by_rows.int() - want.int()).abs()[kept]
    assert steps.max() <= 1  # a logit's last bits may tip a rounding
    assert (steps != 0).float().mean() < 1e-3
    tiles = torch.nn.functional.pad(marked, (0, -v % 192)).view(n, -1, 3, 64).any(3)
    sums = torch.nn.functional.pad(x, (0, -v % 192)).view(n, -1, 3, 64).sum(3)
    hot = torch.stack([(tail.hot >> bit) & 1 for bit in range(3)], 2).bool()
    assert (hot | ~tiles).all()
    assert torch.equal(hot | (sums > TOP * (1 - NEAR)), ~(sums <= TOP * (1 - NEAR)))  # and no other part seems to
    finite = torch.arange(n, device=ON) != 5
    assert torch.allclose(row_totals(s, part)[finite], e.sum(1)[finite], rtol=5e-5)
    if labels:
        assert torch.allclose(picked[finite], z.gather(1, head.y)[finite], atol=1e-4)


def test_the_sweep_stores_the_token_blocks_that_flags_mark_and_no_others():
    n, v, d = SHAPES[0]
    head = made(n, v, d)
    ref2, gain = references(head, head.h.float() @ head.w.float().t())
    whole, some = stored(head), stored(head)
    s, _, _ = run(head, ref2, gain, whole)
    flags = (torch.arange(s.schedule.blocks, device=ON) % 3 == 1).int()
    run(head, ref2, gain, some, flags)
    redone = (flags != 0).repeat_interleave(s.tile.BM)[:n]
    for a, b in zip(in_order(whole, n, v), in_order(some, n, v)):
        assert torch.equal(a[redone], b[redone])
        assert (b[~redone] == 0x38).all()


@pytest.mark.parametrize(("n", "v", "d"), SHAPES)
@pytest.mark.parametrize("labels", [1, 0])
def test_the_list_has_every_mark_once_and_the_label_last(n, v, d, labels):
    head = made(n, v, d, labels)
    ref2, gain = references(head, head.h.float() @ head.w.float().t())
    tail = stored(head)
    run(head, ref2, gain, tail)
    counts = torch.full((n,), -1, dtype=torch.int32, device=ON)
    list_entries.count_entries(tail, head.y, counts)
    order = there(classes_in_order, v)
    marked = tail.rows.view(torch.uint8)[:n] == MARK
    if labels:
        marked &= order != head.y
    assert torch.equal(counts, marked.sum(1).int() + labels)
    counts[3] = 0  # a row without a gradient
    marked[3] = False
    ends = counts.cumsum(0, dtype=torch.int32) + 7
    classes = torch.full((int(ends[-1]) + 9,), -1, dtype=torch.int32, device=ON)
    list_entries.fill_entries(tail, head.y, counts, ends, classes)
    row, place = marked.nonzero().t()
    want = torch.full_like(classes, -1)
    first = ends - counts
    at = torch.arange(len(row), device=ON) - (marked.sum(1).cumsum(0) - marked.sum(1))[row] + first[row]
    want[at] = order[place].int()
    if labels:
        want[(ends - 1)[counts > 0].long()] = head.y[counts > 0, 0].int()
    assert torch.equal(classes, want)


@pytest.mark.parametrize("d", [256, 768, 1168, 2304])
def test_entries_are_added_up_by_class_as_index_add_does(d):
    """Classes without an entry, with some, a whole piece, several pieces, and what begins and ends within them."""
    piece = class_gradients.PIECE
    draw = torch.Generator(ON).manual_seed(d)
    n, vocab = 700, 5000
    counts = [
        0,
        3,
        piece - 3,
        2,
        1,
        2 * piece + 7,
        piece,
        5,
        1,
        1,
        piece - 14,
        4 * piece,
        6,
        15,
        16,
        17,
        *[1] * 700,
        31,
    ]
    classes = torch.cat([torch.full((count,), 5 * at, device=ON) for at, count in enumerate(counts)])
    room = padded(len(classes), piece) + 3 * piece
    classes = torch.cat((classes, classes.new_full((room - len(classes),), vocab)))
    classes = classes[torch.randperm(room, generator=draw, device=ON)].int()
    values = torch.randn(room, generator=draw, device=ON) * torch.logspace(-6, 0, room, device=ON)
    tokens = torch.randint(0, n, (room,), generator=draw, device=ON, dtype=torch.int32)
    h = torch.randn(n, d + 16, generator=draw, device=ON).to(BF16)[:, :d]  # rows that are further apart
    before = torch.randn(vocab, d, generator=draw, device=ON).to(BF16)
    listed = classes < vocab
    terms = (values[:, None].double() * h[tokens.long()].double())[listed]
    want = before.double().index_add(0, classes[listed].long(), terms)
    size = before.double().abs().index_add(0, classes[listed].long(), terms.abs())
    found = []
    for _ in range(2):
        dw = before.clone()
        class_gradients.class_gradients(classes, values, tokens, h, dw)
        assert ((dw.double() - want).abs() <= want.abs() * 2**-8 + size * 1e-5).all()
        untouched = torch.ones(vocab, dtype=torch.bool, device=ON)
        untouched[classes[listed].long()] = False
        assert torch.equal(dw[untouched], before[untouched])
        found.append(dw)
    assert torch.equal(*found)


@pytest.mark.parametrize("weighted", [False, True])
def test_matrices_in_float8_are_those_of_torch_in_the_order_of_the_sweep(weighted):
    rows, d = 1100, 208
    draw = torch.Generator(ON).manual_seed(3)
    x = torch.randn(rows, d, generator=draw, device=ON).to(BF16)
    x[7, 5] = float("inf")
    weight = torch.rand(rows, generator=draw, device=ON) if weighted else None
    factor = torch.ones(rows, 1, device=ON) if weight is None else weight[:, None]
    products = x.float() * factor
    top = quantize.largest(x, weight)
    assert top.item() == products[products.isfinite()].abs().max().item()
    block, order = (128, tokens_in_order) if weighted else (64, classes_in_order)
    out = torch.empty(d, padded(rows, block), dtype=torch.uint8, device=ON).view(F8)
    quantize.transposed_float8(x, top, out, weight, tokens=weighted)
    whole = torch.zeros(out.shape[1], d, device=ON)
    whole[:rows] = x.float() * (448 / top * factor)
    whole[:rows][x.isinf()] = float("nan")
    want = whole.to(F8).view(torch.uint8)[there(order, rows)].t().contiguous().view(F8).float()
    assert torch.allclose(out.float(), want, rtol=2**-3, atol=2**-9, equal_nan=True)  # one step of e4m3
    assert (out.float() != want)[want.isfinite()].float().mean() < 1e-3


def test_float8_products_accumulate_in_float32():
    draw = torch.Generator(ON).manual_seed(4)
    a, b = (torch.rand(m, 50304, generator=draw, device=ON).to(F8) for m in (256, 208))
    scale = torch.tensor(0.37, device=ON)
    out = torch.empty(256, 208, device=ON)
    float8_product(a, b, scale, out)
    want = a.double() @ b.double().t() * 0.37
    assert ((out - want).norm() / want.norm()).item() < 1e-3


def test_levels_are_lower_bounds_near_the_lse():
    head = made(*SHAPES[0])
    lse2 = (head.h.double() @ head.w.double().t()).logsumexp(1) * L
    gap = lse2 - row_levels(head)
    finite = torch.arange(len(gap), device=ON) != 5
    assert gap[finite].min() > -1e-3
    assert gap[finite].mean() < 12


@pytest.mark.parametrize(("n", "v", "d"), SHAPES)
def test_gradients_are_right_in_any_windows(n, v, d):
    """Kernels in a row: a tail of few tokens, products of dw that are added up, rows that are swept again."""
    head = made(n, v, d)
    head.h[5] = head.h[6]
    head.h[::131] *= 40  # exponentials overflow, and levels are far off
    c = (torch.arange(n, device=ON) % 17 != 3).float() / n
    coefficients = RowGrads(c, -c[:, None])
    z = head.h.double() @ head.w.double().t()
    dz = z.softmax(1) * c[:, None]
    dz.scatter_add_(1, head.y, -c[:, None].double())
    want = z.logsumexp(1), dz @ head.w.double(), dz.t() @ head.h.double()
    for tokens, rows in ((padded(n, 128), padded(n, 128)), (padded(n, 128), 256), (512, 256)):
        stats, grads = single_pass.one_float8_pass(head, coefficients, Windows(tokens, v, BF16, rows))
        again = single_pass.one_float8_pass(head, coefficients, Windows(tokens, v, BF16, rows))
        assert torch.equal(grads.h, again[1].h)
        assert torch.equal(grads.w, again[1].w)
        assert ((stats.lse - want[0]).norm() / want[0].norm()).item() < 1e-6
        for got, exact in zip(grads[:2], want[1:]):
            assert ((got.double() - exact).norm() / exact.norm()).item() < 5e-3  # results alone are rounded by 1.7e-3

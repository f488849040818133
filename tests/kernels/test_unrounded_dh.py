"""The gradient of hidden states in float32 (`Windows.dh`): what is rounded to their dtype where nobody asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, Needs, RowGrads, Windows
from fusedhead.kernels.torch_engine import engine, whole
from fusedhead.kernels.transform.transform import parse

N, D, V, F32 = 40, 16, 90, torch.float32
BOTH, HIDDEN = Needs(True, True, False, False), Needs(True, False, False, False)


def head(dtype: torch.dtype, transform: str = "") -> Head:
    make = torch.Generator().manual_seed(2)
    h, w = (torch.randn(size, generator=make).to(dtype) for size in ((N, D), (V, D)))
    empty = torch.empty(0)
    y = torch.randint(V, (N, 1), generator=make)
    return Head(h, w, y, empty.reshape(0, V), empty.reshape(0, N), empty, parse(transform))


def upstream(**more: Tensor) -> RowGrads:
    make = torch.Generator().manual_seed(3)
    c = torch.rand(N, generator=make)
    return RowGrads(c, -c[:, None], **more)


def of_loss(of: Any, x: Head, needs: Needs, windows: Windows) -> Tensor:
    return of.head_loss(x, upstream(), needs, windows)[1].h  # type: ignore[no-any-return]


def of_labels(of: Any, x: Head, needs: Needs, windows: Windows) -> Tensor:
    c = upstream(sum=torch.full((N,), 0.1))
    return of.head_loss(x, c, needs, windows)[1].h  # type: ignore[no-any-return]


def of_backward(of: Any, x: Head, needs: Needs, windows: Windows) -> Tensor:
    stats = of.head_stats(x, frozenset({"lse", "picked"}), windows)
    return of.head_stats_backward(x, upstream(), stats, needs, windows).h  # type: ignore[no-any-return]


def of_entropy(of: Any, x: Head, needs: Needs, windows: Windows) -> Tensor:
    stats = of.head_stats(x, frozenset({"lse", "lse_low", "entropy"}), windows)
    c = RowGrads(entropy=torch.linspace(0, 1, N))
    return of.head_stats_backward(x, c, stats, needs, windows).h  # type: ignore[no-any-return]


WAYS: tuple[Callable[..., Tensor], ...] = (of_loss, of_labels, of_backward, of_entropy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", [BOTH, HIDDEN], ids=["both", "h"])
@pytest.mark.parametrize("way", WAYS)
def test_the_torch_engine_rounds_it_once(way: Callable[..., Tensor], needs: Needs, dtype: torch.dtype) -> None:
    x, windows = head(dtype), Windows(16, 40, F32)
    unrounded, rounded = (way(engine, x, needs, windows._replace(dh=dh)) for dh in (F32, None))
    assert (unrounded.dtype, rounded.dtype) == (F32, dtype)
    assert torch.equal(unrounded.to(dtype), rounded)
    assert not torch.equal(unrounded, rounded.to(F32))


@pytest.mark.parametrize("way", WAYS[:3])
def test_whole_logits_multiply_it_in_float32(way: Callable[..., Tensor]) -> None:
    x, windows = head(torch.bfloat16), Windows(N, V, F32)
    unrounded, rounded = (way(whole, x, BOTH, windows._replace(dh=dh)) for dh in (F32, None))
    assert unrounded.dtype == F32
    torch.testing.assert_close(unrounded.to(torch.bfloat16), rounded, rtol=2e-2, atol=1e-3)


@pytest.fixture
def triton_engine() -> Any:
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    from fusedhead.kernels.triton_engine import engine as found

    return found


# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
interpreted = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@interpreted
@pytest.mark.parametrize("cut", [Windows(64, 90, torch.float16), Windows(32, 64, F32)], ids=["whole", "windows"])
@pytest.mark.parametrize("needs", [BOTH, HIDDEN], ids=["both", "h"])
@pytest.mark.parametrize("way", [of_loss, of_labels, of_entropy])
def test_the_triton_engine_rounds_it_once(
    triton_engine: Any, way: Callable[..., Tensor], needs: Needs, cut: Windows
) -> None:
    x = head(torch.float16)
    unrounded, rounded = (way(triton_engine, x, needs, cut._replace(dh=dh)) for dh in (F32, None))
    assert (unrounded.dtype, rounded.dtype) == (F32, torch.float16)
    step = torch.finfo(torch.float16).eps
    assert (unrounded - rounded.to(F32)).abs().max() <= step * unrounded.abs().max()
    assert not torch.equal(unrounded, rounded.to(F32))


@interpreted
def test_dw_is_the_same_beside_it(triton_engine: Any) -> None:
    x, cut = head(torch.float16), Windows(32, 90, F32)
    for of in (engine, triton_engine):
        dw = [of.head_loss(x, upstream(), BOTH, cut._replace(dh=dh))[1].w for dh in (F32, None)]
        assert torch.equal(*dw)

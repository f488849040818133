"""dH of a head in shards: rounded to two bytes once, when the parts of all ranks are summed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.functional.ranks import on_ranks
from tests.parallel.hidden_gradients import BF16, FORMS, mixed, of_one_process


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks("tests.parallel.hidden_gradients:outcomes", 4)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("name", [*FORMS, *(f"{form}, entropy" for form in FORMS[1:])])
def test_it_errs_as_the_head_of_one_process_does(name: str, results: list[dict[str, Any]]) -> None:
    loss = mixed if "entropy" in name else None
    exact, eager = of_one_process(torch.float64, loss), of_one_process(BF16, loss)
    one = of_one_process(BF16, loss, fused=True)
    ours = results[0][name]
    assert all(torch.equal(ours, other[name]) for other in results)
    assert rms(ours - exact) <= 1.05 * rms(one - exact)
    assert rms(ours - exact) <= rms(eager - exact)

"""The text of a token program reads back as it was written, is never executed, and names what it has no form for."""

from __future__ import annotations

import pytest

import fusedhead.lowering.token_ops  # noqa: F401  registers the ops
from fusedhead.kernels.tokenwise.program import Unspeakable, argument_text, read
from tests.lowering.divergence import DIVERGENCE


def test_a_program_reads_back_as_it_was_written() -> None:
    assert read(DIVERGENCE).text == DIVERGENCE
    odd = """\
v0 = head(r0, t1, t2, r3, '', bfloat16)
v1 = clamp.default(v0, -inf, 1e-05)
v2 = sum.dim_IntList(v1, [1], True, dtype=float32)
return v2""".replace("\n", "; ")
    assert read(odd).text == odd
    assert "\n" not in odd


@pytest.mark.parametrize("text", ["return v0[1]", "v0 = __import__('os'); return v0.x", "v0 = head(open); return v0"])
def test_a_program_is_data(text: str) -> None:
    with pytest.raises((Unspeakable, AttributeError)):
        read(text)


def test_what_a_program_has_no_form_for_is_named() -> None:
    with pytest.raises(Unspeakable, match="object"):
        argument_text(object())

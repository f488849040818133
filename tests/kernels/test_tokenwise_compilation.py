"""Windows of token programs cover every token once, and a partial window is compiled from the second time on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fusedhead.kernels.tokenwise.compilation import windows


@given(st.integers(0, 500), st.integers(1, 100), st.booleans())
def test_windows_cover_every_token_once(n: int, tokens: int, compiled: bool) -> None:
    for _ in range(2):
        found = [i for i, _ in windows(n, tokens, ("a test", n, tokens), compiled)]
        assert [at for i in found for at in range(i.start, i.stop)] == list(range(n))
        assert all(i.stop - i.start <= tokens for i in found)


def test_what_is_left_over_is_compiled_when_it_comes_again() -> None:
    first, second = (list(windows(20, 16, ("left over",), True)) for _ in range(2))
    assert first == [(slice(0, 16), True), (slice(16, 18), False), (slice(18, 20), False)]
    assert second == [(slice(0, 16), True), (slice(16, 20), True)]

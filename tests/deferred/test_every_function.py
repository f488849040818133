"""Every method, attribute and function of a tensor, on a deferred one and the real one: results, errors, logs.

They run in a child process, so that one that ends it, or hangs, is a difference like any other; what ends the process
in eager code is none.

    FUSEDHEAD_EVERY_FUNCTION=1 python -m pytest tests/deferred/test_every_function.py    # all; else one in some
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.deferred.functions import functions
from tests.deferred.heads import Model, deferring, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
EVERY = bool(os.environ.get("FUSEDHEAD_EVERY_FUNCTION"))
STRIDE = {"attributes": 24, "functions": 160}
LONGEST = 120  # seconds for one call
# of the object and not of the tensor, of its memory, or of the names of autograd's nodes
OTHERWISE = frozenset({
    "__class__", "__delattr__", "__dict__", "__dir__", "__doc__", "__getattribute__", "__getstate__",
    "__hash__", "__init__", "__init_subclass__", "__module__", "__new__", "__reduce__", "__reduce_ex__",
    "__repr__", "__setattr__", "__sizeof__", "__str__", "__subclasshook__", "__torch_dispatch__",
    "__torch_function__", "__weakref__", "_cdata", "_grad_fn", "_make_dtensor", "_make_subclass",
    "_make_wrapper_subclass", "_python_dispatch", "data_ptr", "grad_fn",
})  # fmt: skip
RANDOM = ("empty", "resize", "rand", "new_empty")  # nothing to compare: memory as it was
Call = Callable[[Tensor], Any]


def attributes() -> Iterator[tuple[str, Call]]:
    for name in sorted(set(dir(Tensor)) - OTHERWISE):
        if callable(getattr(Tensor, name)):
            yield f"z.{name}()", lambda z, name=name: getattr(z, name)()
        else:
            yield f"z.{name}", lambda z, name=name: getattr(z, name)


CALLS: dict[str, Callable[[], Iterator[tuple[str, Call]]]] = {
    "attributes": attributes,
    "functions": functions,
}


class Listening(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.heard.append(record.getMessage())


def outcome(call: Call, z: Tensor) -> tuple[Any, set[str], list[str]]:
    """The result or the error, the warnings, and what was logged."""
    ears = Listening()
    loggers = [logging.getLogger(name) for name in ("torch", "torch._subclasses.fake_tensor", "fusedhead")]
    for logger in loggers:
        logger.addHandler(ears)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            try:
                result = call(z)
            except Exception as error:
                result = error
    finally:
        for logger in loggers:
            logger.removeHandler(ears)
    return result, {str(each.message)[:60] for each in said}, ears.heard


def compare(found: Any, expected: Any, numbers: bool) -> None:
    if isinstance(expected, Exception):
        assert isinstance(found, type(expected)), found
    elif isinstance(expected, Tensor):
        assert isinstance(found, Tensor), found
        for name in ("shape", "dtype", "layout", "requires_grad", "is_leaf"):
            assert getattr(found, name) == getattr(expected, name), name
        if numbers:
            if expected.dtype in (torch.uint64, torch.uint32):
                found, expected = found.double(), expected.double()
            dense = [t.detach().to_dense() if t.layout is not torch.strided else t.detach() for t in (found, expected)]
            torch.testing.assert_close(dense[0] + 0, dense[1] + 0, rtol=2e-3, atol=1e-4, equal_nan=True)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            compare(one, other, numbers)
    elif isinstance(expected, (bool, int, str, torch.dtype, torch.device, type(None))):
        assert found == expected


def difference(at: int, name: str, call: Call, forwards: Any, x: Tensor, say: Callable[[Any], None]) -> str:
    """What differs in the call numbered ``at``, or ""; says before each side that it begins."""
    outcomes = []
    for side, forward in enumerate(forwards):
        z = forward(x)[0] if at % 3 == 0 else forward(x)
        say((at, side))
        outcomes.append(outcome(call, z if at % 2 else z.detach()))
    (expected, warned, logged), (found, warned_too, logged_too) = outcomes
    try:
        compare(found, expected, not any(word in name for word in RANDOM))
        assert logged_too == logged, logged_too
        assert isinstance(expected, Exception) or warned_too <= warned, warned_too - warned
    except Exception as error:
        return f"{name}: {type(error).__name__} {str(error)[:300]}"
    return ""


def run_from(first: int, calls: list[tuple[str, Call]], forwards: Any, x: Tensor, pipe: Any) -> None:
    torch.set_num_threads(1)  # a fork leaves torch's pool of threads to whoever asks first, and two may
    for at in range(first, len(calls)):
        pipe.send((at, difference(at, *calls[at], forwards, x, pipe.send)))


def in_children(calls: list[tuple[str, Call]], forwards: Any, x: Tensor) -> list[str]:
    """The differences of all calls."""
    found, at = [], 0
    context = multiprocessing.get_context("fork")
    while at < len(calls):
        ours, theirs = context.Pipe()
        child = context.Process(target=run_from, args=(at, calls, forwards, x, theirs))
        child.start()
        theirs.close()
        begun: Any = (at, 0)
        try:
            while ours.poll(LONGEST):
                at, said = ours.recv()
                begun = (at, said) if isinstance(said, int) else None
                found += [said] if isinstance(said, str) and said else []
            found.append(f"{calls[at][0]}: hangs")
        except EOFError:
            if begun is not None and begun[1] == 1:
                child.join()
                found.append(f"{calls[at][0]}: ends the process ({child.exitcode})")
        child.kill()
        child.join()
        at += 1
    return found


@pytest.mark.parametrize("kind", CALLS)
def test_they_do_to_deferred_logits_what_they_do_to_real_ones(kind: str) -> None:
    model, x = Model(), tokens(1, 3)
    forwards = (model, deferring(model))
    forwards[1](x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a child has no other
    try:
        differences = in_children(list(CALLS[kind]())[:: 1 if EVERY else STRIDE[kind]], forwards, x)
    finally:
        torch.set_num_threads(threads)
    assert not differences, "\n".join(differences)

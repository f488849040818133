"""Calls on deferred logits and on real ones, compared in a process of their own: results, errors, warnings, logs.

`run` is the target of a process.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.deferred.functions import functions
from tests.deferred.heads import Model, deferring, tokens

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
            cause = record.exc_info[1] if record.exc_info else None
            self.heard.append(record.getMessage() + (f": {cause!r}" if cause else ""))


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


def compare(actual: Any, expected: Any, numbers: bool) -> None:
    if isinstance(expected, Exception):
        assert isinstance(actual, type(expected)), actual
    elif isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), actual
        for name in ("shape", "dtype", "layout", "requires_grad", "is_leaf"):
            assert getattr(actual, name) == getattr(expected, name), name
        if numbers:
            if expected.dtype in (torch.uint64, torch.uint32):
                actual, expected = actual.double(), expected.double()
            dense = [t.detach().to_dense() if t.layout is not torch.strided else t.detach() for t in (actual, expected)]
            torch.testing.assert_close(dense[0] + 0, dense[1] + 0, rtol=2e-3, atol=1e-4, equal_nan=True)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            compare(one, other, numbers)
    elif isinstance(expected, (bool, int, str, torch.dtype, torch.device, type(None))):
        assert actual == expected


def difference(at: int, name: str, call: Call, forwards: Any, x: Tensor, say: Callable[[Any], None]) -> str:
    """What differs in the call numbered ``at``, or ""; says before each side that it begins."""
    outcomes = []
    for side, forward in enumerate(forwards):
        z = forward(x)[0] if at % 3 == 0 else forward(x)
        say((at, side))
        outcomes.append(outcome(call, z if at % 2 else z.detach()))
    (expected, warned, logged), (actual, warned_too, logged_too) = outcomes
    try:
        compare(actual, expected, not any(word in name for word in RANDOM))
        assert logged_too == logged, logged_too
        assert isinstance(expected, Exception) or warned_too <= warned, warned_too - warned
    except Exception as error:
        return f"{name}: {type(error).__name__} {str(error)[:300]}"
    return ""


def run(kind: str, stride: int, first: int, pipe: Any) -> None:
    """Every ``stride``-th call of a kind from number ``first`` on; says what each begins, and what differs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("fusedhead").setLevel(logging.WARNING)
    model, x = Model(), tokens(1, 3)
    forwards = (model, deferring(model))
    forwards[1](x)
    calls = list(CALLS[kind]())[::stride]
    for at in range(first, len(calls)):
        pipe.send((at, difference(at, *calls[at], forwards, x, pipe.send)))

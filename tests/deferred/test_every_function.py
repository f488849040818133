"""Every method, attribute and function of torch, on a deferred tensor and on the real one: results, errors, warnings, logs.

    FUSEDHEAD_EVERY_FUNCTION=1 python -m pytest tests/deferred/test_every_function.py    # all; else one in some
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import get_testing_overrides, resolve_name
from torch.testing._internal.common_methods_invocations import op_db

from tests.deferred.heads import Model, deferring, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
STRIDE = 1 if os.environ.get("FUSEDHEAD_EVERY_FUNCTION") else 24
# of the object and not of the tensor, of its memory, or of the names of autograd's nodes
OTHERWISE = frozenset(
    """
    __class__ __delattr__ __dict__ __dir__ __doc__ __getattribute__ __getstate__ __hash__ __init__ __init_subclass__
    __module__ __new__ __reduce__ __reduce_ex__ __repr__ __setattr__ __sizeof__ __str__ __subclasshook__
    __torch_dispatch__ __torch_function__ __weakref__ _cdata _grad_fn _make_dtensor _make_subclass
    _make_wrapper_subclass _python_dispatch data_ptr grad_fn
    """.split()
)
RANDOM = ("empty", "resize", "rand", "new_empty")  # nothing to compare: memory as it was
Call = Callable[[Tensor], Any]


def attributes() -> Iterator[tuple[str, Call]]:
    for name in sorted(set(dir(Tensor)) - OTHERWISE):
        if callable(getattr(Tensor, name)):
            yield f"z.{name}()", lambda z, name=name: getattr(z, name)()
        else:
            yield f"z.{name}", lambda z, name=name: getattr(z, name)


def functions() -> Iterator[tuple[str, Call]]:
    """What dispatches on tensors, with one tensor, or with a number, a fraction or another tensor after it."""
    for func, like in get_testing_overrides().items():
        needed = [
            p for p in inspect.signature(like).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]  # fmt: skip
        for more in ([], [0], [2.0], ["z"]):
            if len(needed) == 1 + len(more) and getattr(func, "__name__", "") not in OTHERWISE:
                yield f"{resolve_name(func)}{more}", lambda z, func=func, more=more: func(
                    z, *(z if m == "z" else m for m in more)
                )


def operators() -> Iterator[tuple[str, Call]]:
    """Torch's own database, with its first sample's arguments."""
    for op in op_db:
        if torch.float32 in op.supported_dtypes("cpu"):
            yield f"{op.full_name}", lambda z, op=op: with_sample(op, z)


def with_sample(op: Any, z: Tensor) -> Any:
    sample = next(iter(op.sample_inputs("cpu", torch.float32)))
    several = isinstance(sample.input, (list, tuple))
    return op([z, z] if several else z, *sample.args, **sample.kwargs)


CALLS = [*attributes(), *functions(), *operators()]
SAMPLE = CALLS[::STRIDE]


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
            dense = [t.detach().to_dense() if t.layout is not torch.strided else t.detach() for t in (found, expected)]
            torch.testing.assert_close(dense[0] + 0, dense[1] + 0, rtol=2e-3, atol=1e-4, equal_nan=True)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            compare(one, other, numbers)
    elif isinstance(expected, (bool, int, str, torch.dtype, torch.device, type(None))):
        assert found == expected


@pytest.fixture(scope="module")
def twins() -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    model, x = Model(), tokens()
    return model, deferring(model), x


@pytest.mark.parametrize(("name", "call"), SAMPLE, ids=[name for name, _ in SAMPLE])
@pytest.mark.parametrize("detached", [False, True], ids=["with history", "without"])
def test_it_does_to_deferred_logits_what_it_does_to_real_ones(
    twins: Any, name: str, call: Call, detached: bool
) -> None:
    real, deferred = (run(twins[2]) for run in twins[:2])
    if detached:
        real, deferred = real.detach(), deferred.detach()
    expected, warned, logged = outcome(call, real)
    found, warned_too, logged_too = outcome(call, deferred)
    compare(found, expected, not any(word in name for word in RANDOM))
    assert logged_too == logged
    assert isinstance(expected, Exception) or warned_too <= warned

"""What takes the memory or the class of a tensor: deferred logits give what the real tensor gives, or torch's error."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils import dlpack

from tests.deferred.heads import Model, deferring, tokens


class Sub(Tensor):
    pass


def saved(z: Tensor) -> Tensor:
    stored = io.BytesIO()
    torch.save(z, stored)
    stored.seek(0)
    return torch.load(stored)


def queued(z: Tensor) -> Tensor:
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    queue.put(z)
    return queue.get()


TAKES: dict[str, Callable[[Tensor], Any]] = {
    "torch.from_dlpack": torch.from_dlpack,
    "dlpack.from_dlpack": dlpack.from_dlpack,
    "__dlpack__": lambda z: dlpack.from_dlpack(z.__dlpack__()),
    "__dlpack__ of a version": lambda z: dlpack.from_dlpack(z.__dlpack__(max_version=(1, 0))),
    "__dlpack_device__": lambda z: tuple(map(int, z.__dlpack_device__())),
    "numpy.from_dlpack": np.from_dlpack,
    "numpy": lambda z: z.numpy(),
    "numpy.asarray": np.asarray,
    "numpy.sum": lambda z: float(np.sum(z)),
    "data_ptr": lambda z: z.data_ptr() > 0,
    "its storage": lambda z: z.untyped_storage().data_ptr() > 0,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "torch.save": saved,
    "a queue": queued,
    "torch.tensor": torch.tensor,
    "new_tensor": lambda z: z.new_tensor(z),
    "as_subclass": lambda z: z.as_subclass(Sub),
    "the plain tensor, of a subclass": lambda z: Sub(z.as_subclass(Tensor)),
    "the plain tensor, by dlpack": lambda z: dlpack.from_dlpack(dlpack.to_dlpack(z.detach().as_subclass(Tensor))),
    "torch.asarray": lambda z: torch.asarray(z, requires_grad=False),
    "share_memory_": lambda z: z.share_memory_().is_shared(),
    "set_": lambda z: z.set_(),
}


def outcome(take: Callable[[Tensor], Any], z: Tensor) -> Any:
    try:
        result = take(z)
    except Exception as error:
        return type(error)
    if isinstance(result, Tensor):
        return str((result.requires_grad, result.is_leaf, result.shape)), result.detach() + 0
    return result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("detached", [True, False])
def test_what_is_taken_out_is_what_eager_code_gets(detached: bool) -> None:
    model, x = Model(), tokens()
    run = deferring(model)
    for name, take in TAKES.items():
        pair = [forward(x).detach() if detached else forward(x) for forward in (model, run)]
        expected, actual = (outcome(take, z) for z in pair)
        if isinstance(expected, (np.ndarray, tuple)):
            torch.testing.assert_close(actual[-1], expected[-1], msg=name)
            assert np.all(actual[0] == expected[0]) or isinstance(expected, np.ndarray), name
        else:
            assert type(actual) is type(expected), name
            assert isinstance(expected, float) or actual == expected, name


def test_torchs_code_that_asks_nobody_raises_torchs_error() -> None:
    z = deferring(Model())(tokens()).detach()
    with pytest.raises(RuntimeError, match="already associated to a python object"):
        Sub(z)
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        dlpack.to_dlpack(z)


def test_a_queue_shares_the_memory_of_the_logits() -> None:
    z = deferring(Model())(tokens()).detach()
    assert torch.equal(queued(z), z)
    assert z.is_shared()

"""Deferred logits in other threads and other processes."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.deferred.heads import (
    B,
    Model,
    T,
    V,
    deferring,
    gradients,
    is_deferred,
    tokens,
)  # fmt: skip


def test_another_thread_may_read_it(model: Model) -> None:
    x = tokens()
    z, real, actual = deferring(model)(x), model(x), []

    def read() -> None:
        with torch.no_grad():
            actual.append(z + 0)
            actual.append(F.cross_entropy(z.view(-1, V), x.view(-1)))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(actual) == 8
    for value in actual:
        expected = real if value.ndim else F.cross_entropy(real.view(-1, V), x.view(-1))
        torch.testing.assert_close(value, expected.detach())


X = torch.arange(B * T).reshape(B, T)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Model()
        wanted = gradients(model, F.cross_entropy(model(X).view(-1, V), X.view(-1)))
        wrapped = nn.parallel.DistributedDataParallel(deferring(model), find_unused_parameters=True)
        z = wrapped(X)
        actual = gradients(model, F.cross_entropy(z.view(-1, V), X.view(-1)))
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_hands_it_on(model: Model) -> None:
    z = nn.DataParallel(deferring(model))(X)
    assert is_deferred(z)
    wanted = gradients(model, F.cross_entropy(model(X).view(-1, V), X.view(-1)))
    torch.testing.assert_close(
        gradients(model, F.cross_entropy(z.view(-1, V), X.view(-1))), wanted, rtol=1e-4, atol=1e-6
    )


def test_collectives_get_numbers(model: Model, tmp_path: Any) -> None:
    """What accelerate does to gather metrics: the memory of the tensor is read past Python."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run, real, into = deferring(model), model(X).detach(), [torch.zeros(B, T, V)]
        torch.distributed.all_gather(into, run(X).detach().contiguous())
        assert torch.equal(into[0], real)
        reduced = run(X).detach()
        torch.distributed.all_reduce(reduced)
        assert torch.equal(reduced + 0, real)
    finally:
        torch.distributed.destroy_process_group()

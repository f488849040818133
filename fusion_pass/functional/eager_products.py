"""A scope in which eager products are asked first whether they are heads whose logits can wait.

``F.linear(h, embedding.weight)`` or ``h @ embedding.weight.T`` in a model's own code calls no layer. What sees such
calls is a mode of torch functions; it is on inside methods of models that were named, on their thread, and nowhere
else. Dynamo traces what is here as if the mode were not: compiled code has the same graphs with and without it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Product = Callable[[Callable[..., Any], "tuple[Any, ...]", "dict[str, Any]"], Any]
EAGER_PRODUCTS = frozenset({F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm})


class EagerProducts(TorchFunctionMode):
    """Gives products to ``product(func, args, kwargs)``, and makes every other call as it is."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling() or func not in EAGER_PRODUCTS:
            return func(*args, **(kwargs or {}))
        return self.product(func, args, kwargs or {})


def method_in(scope: Callable[[Any], AbstractContextManager[Any] | None], original: FunctionType) -> Callable[..., Any]:
    """``original``, a method, whose eager calls are made inside ``scope(self)``.

    It has the names and the place in files of ``original``: what reads a function's text finds that.
    """
    is_compiling = torch.compiler.is_compiling

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return original(self, *args, **kwargs)
        around = scope(self)
        if around is None:
            return original(self, *args, **kwargs)
        with around:
            return original(self, *args, **kwargs)

    at = original.__code__
    code = method.__code__.replace(co_filename=at.co_filename, co_firstlineno=at.co_firstlineno)
    method_copy = FunctionType(code, original.__globals__, original.__name__, None, method.__closure__)
    return wraps(original)(method_copy)

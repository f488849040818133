"""A scope in which an eager product with the weight of a head returns deferred logits.

``F.linear(h, embedding.weight)`` or ``h @ embedding.weight.T`` in a model's own code calls no layer. A mode of
torch functions sees such calls. It is on inside methods of the given models, on their thread, and nowhere else. Dynamo
traces these functions as if the mode were off: compiled code has the same graphs with and without it.
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
    """Hands products to ``product(func, args, kwargs)`` and runs every other call unchanged."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling() or func not in EAGER_PRODUCTS:
            return func(*args, **(kwargs or {}))
        return self.product(func, args, kwargs or {})


def method_in(scope: Callable[[Any], AbstractContextManager[Any] | None], original: FunctionType) -> Callable[..., Any]:
    """A method that runs ``original`` inside ``scope(self)`` in eager mode.

    It has the names, the file and the lines of ``original``, so that readers of source find that.
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

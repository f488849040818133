"""Heads that are no layers: eager products in a model's code with a weight [V, D], often that of its embedding.

No function of torch is replaced for them. The methods of a model that was given to `defer` run inside a scope
(`functional.eager_products`), for this model alone, and this file reads the products that the scope sees.

| product                                      | the weight                                    |
|----------------------------------------------|-----------------------------------------------|
| ``F.linear(h, w)``, ``F.linear(h, w, b)``    | ``w``, a parameter of the model               |
| ``h @ w.T``, ``torch.matmul``, ``torch.mm``  | a parameter that the right operand transposes |
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from fusedhead.analysis.lone_heads import has_sizes_of_a_head
from fusedhead.compat import function_modes
from fusedhead.eager.heads import EagerHead, deferred_logits, path_of
from fusedhead.functional.eager_products import EagerProducts, method_in

MODELS: Any = WeakIdKeyDictionary()  # those in whose methods products are seen, with their heads by name
_guard = threading.RLock()
_methods: dict[tuple[type, str], Any] = {}  # the methods that are ours now, by class and name


def weights(module: nn.Module) -> Iterator[str]:
    """The names of parameters that have the sizes of a head."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and has_sizes_of_a_head(*parameter.shape):
            yield name


def watch_products(module: nn.Module) -> None:
    """See the products in the methods of this model."""
    with _guard:
        MODELS.setdefault(module, {})
        cls = type(module)
        names = ["forward", *(name for name, value in vars(cls).items() if is_a_method(name, value))]
        for name in dict.fromkeys(names):
            original = getattr(cls, name, None)
            if (cls, name) not in _methods and isinstance(original, FunctionType):
                _methods[cls, name] = ours = method_in(scope, original)
                setattr(cls, name, ours)


def is_a_method(name: str, value: Any) -> bool:
    """Whether a member of a class is a function that a program calls, and that has ended when it returns."""
    return (
        isinstance(value, FunctionType)
        and not name.startswith("_")
        and not inspect.iscoroutinefunction(value)
        and not inspect.isgeneratorfunction(value)
        and not inspect.isasyncgenfunction(value)
    )


def scope(module: nn.Module) -> EagerProducts | None:
    """The scope of a model's method; None for a model that was not given to `defer`, and inside a scope."""
    if module not in MODELS or torch.jit.is_scripting() or torch.jit.is_tracing():
        return None
    if any(type(mode) is EagerProducts for mode in function_modes()):
        return None
    return EagerProducts(partial(serve_product, module))


_tables: set[tuple[int, int]] = set()  # sizes of embeddings whose weight may be a head


def watch_tables() -> Callable[[], None]:
    """Note which embeddings are made from now on. Returns the function that ends it."""

    def note(module: nn.Module, name: str, parameter: Any) -> None:
        if isinstance(module, nn.Embedding) and parameter is not None and parameter.ndim == 2:
            sizes = tuple(map(int, parameter.shape))
            if has_sizes_of_a_head(*sizes):
                _tables.add(sizes)  # type: ignore[arg-type]

    handle = register_module_parameter_registration_hook(note)

    def end() -> None:
        handle.remove()
        _tables.clear()

    return end


def embedding_note(heads: Iterable[tuple[Any, Any]]) -> str:
    """A note on embeddings for whose sizes [V, D] no head was found, or ""."""
    left = _tables.difference(heads)
    if not left:
        return ""
    vocab, depth = max(left, key=lambda sizes: sizes[0] * sizes[1])
    return (
        f"an embedding of {vocab:,} x {depth:,} was made, and no head of these sizes was met. If the model multiplies "
        "by it in code that nothing compiles, as F.linear(h, embedding.weight), fusedhead.defer(model) fuses the loss"
    )


def serve_product(module: nn.Module, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of one product in a method of a model: deferred logits, or torch's own."""
    operands = operands_of(func, *args, **kwargs)
    if operands is not None:
        owner = owner_of(module, operands[1])
        logits = None if owner is None else deferred_logits(*owner, operands)
        if logits is not None:
            return logits
    return func(*args, **kwargs)


def operands_of(func: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(h, w [V, D], b or None) of a call that is ``F.linear(h, w, b)``."""
    if func is F.linear:
        by_name = dict(zip(("input", "weight", "bias"), args)) | kwargs
        h, w, b = (by_name.get(name) for name in ("input", "weight", "bias"))
        return (h, w, b) if type(h) is Tensor and type(w) is nn.Parameter else None
    if len(args) != 2 or kwargs or type(args[0]) is not Tensor or type(args[1]) is not Tensor:
        return None
    h, right = args
    if h.ndim < 2 or right.ndim != 2:
        return None
    w = right._base
    is_its_transpose = (
        type(w) is nn.Parameter
        and w.shape == right.shape[::-1]
        and w.stride() == right.stride()[::-1]
        and w.storage_offset() == right.storage_offset()
        and w.dtype == right.dtype
        and w.requires_grad == right.requires_grad
    )
    return (h, w, None) if is_its_transpose else None


def owner_of(module: nn.Module, weight: Tensor) -> tuple[Callable[[], EagerHead], nn.Module] | None:
    """(a function that returns the record of the head with this weight, the module that owns the weight)."""
    if weight.ndim != 2 or not has_sizes_of_a_head(*weight.shape):
        return None
    for name, owner in module.named_modules():
        if any(parameter is weight for parameter in owner._parameters.values()):
            return partial(record_of, module, name), owner
    return None


def record_of(module: nn.Module, name: str) -> EagerHead:
    """The record of the head with the weight of the part ``name`` of a model."""
    records = MODELS[module]
    if name not in records:
        records[name] = EagerHead(".".join(part for part in (path_of(module), name) if part))
    return records[name]

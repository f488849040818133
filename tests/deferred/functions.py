"""Calls of everything that torch lets a tensor's class override, on one tensor, with arguments made up by their types.

What a signature does not say is guessed by the argument's name. Most calls work; the others fail in eager code too,
which is as good a thing to compare.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import get_testing_overrides, resolve_name
from torch.testing._internal.generated.annotated_fn_args import annotated_args

Call = Callable[[Tensor], Any]
Other = Callable[[Tensor], Any]  # what stands where a second tensor is asked for
# of other processes, or of an object and not of the tensor
LEFT = (
    "data_ptr", "_cdata", "distributed", "__torch_function__", "__torch_dispatch__", "__getattribute__", "__setstate__",
)  # fmt: skip
NAMED: dict[str, Any] = {
    "equation": "...v->...", "pad": (1, 1), "callable": lambda a: a, "hook": lambda grad: grad, "dtype": torch.float32,
    "kernel_size": 1, "output_size": 1, "norm_type": 2.0, "exponent": 2.0, "num_groups": 1, "num_heads": 1,
    "embed_dim_to_check": 8, "dropout_p": 0.0, "add_zero_attn": False, "threshold": 0.1, "value": 0.5, "val": 0.5,
    "split_size_or_sections": 2, "n_fft": 16, "shape": (-1,), "size": (-1,), "normalized_shape": (1024,), "memo": {},
    "format_spec": "", "proto": 2, "kwargs": {}, "args": (), "idx": 0, "k": 0, "d": 0.5, "targets": 0, "c": 0,
    "input_lengths": (1,), "target_lengths": (1,),
}  # fmt: skip
LISTS = frozenset({"tensors", "matrices", "operands", "tensor_list", "input_list"})
TYPED: dict[str, Any] = {
    "int64_t": 0, "SymInt": 1, "Scalar": 2, "bool": False, "double": 0.5, "SymIntArrayRef": (1,), "IntArrayRef": (0,),
    "ScalarType": torch.float32, "c10::string_view": "mean", "int64_t?": None, "double?": None, "bool?": None,
    "Scalar?": None, "ScalarType?": None, "IntArrayRef?": None, "c10::string_view?": None, "Tensor?": None,
}  # fmt: skip
OTHERS: dict[str, Other] = {
    "itself": lambda z: z,
    "numbers": lambda z: torch.linspace(-1, 1, z.numel()).view(z.shape),
    "integers": lambda z: torch.arange(z.numel()).view(z.shape) % 3,
    "a number": lambda z: 2,
}


def functions() -> Iterator[tuple[str, Call]]:
    """Every function and method, with each of `OTHERS`."""
    for function, dummy in get_testing_overrides().items():
        name = resolve_name(function) or getattr(function, "__name__", str(function))
        if any(word in name for word in LEFT):
            continue
        kinds = list(arguments(function, dummy))
        several = sum(kind in ("Tensor", "TensorList") for kind, _ in kinds) > 1
        for other in OTHERS if several else ("itself",):
            yield f"{name} of {other}", call(function, kinds, OTHERS[other])


def arguments(function: Any, dummy: Any) -> Iterator[tuple[str, Any]]:
    """The kinds of the arguments that a function needs; "" and a value for those that are known by their name."""
    known = annotated_args.get(function)
    if known is not None:
        for each in known:
            if each["is_kwarg_only"] != "True":
                size = each.get("size")
                kind = each["simple_type"]
                yield kind, (each["name"], size)
        return
    for name, parameter in inspect.signature(dummy).parameters.items():
        if parameter.default is not inspect.Parameter.empty or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        kind = "TensorList" if name in LISTS else "" if name in NAMED else "Tensor"
        yield kind, (name, None)


def call(function: Any, kinds: list[tuple[str, Any]], other: Other) -> Call:
    def of(z: Tensor) -> Any:
        inputs: list[Any] = []
        for kind, (name, size) in kinds:
            if kind == "Tensor":
                inputs.append(other(z) if any(t is z for t in inputs) else z)
            elif kind == "TensorList":
                inputs.append([z, other(z)])
            elif kind.startswith("c10::List"):
                inputs.append([torch.zeros(1, dtype=torch.int64)])
            elif kind == "":
                inputs.append(NAMED[name])
            elif kind not in TYPED:
                inputs.append(None)
            else:
                value = TYPED[kind]
                inputs.append(value * size if isinstance(value, tuple) and isinstance(size, int) else value)
        return function(*inputs)

    return of

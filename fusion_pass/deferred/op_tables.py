"""Tables of torch functions by what a call on deferred logits needs.

| `METADATA`, `ALONE`, `ALIKE` | a tensor's looks: answered without computing anything                       |
| `LAZY`                       | recorded as it is: a step that rules follow                                 |
| `PUT_OFF`                    | recorded if a rule reads its result as rows that are computed apart         |
| `may_write_argument`         | the logits have to exist first, unless the memory is theirs alone (`FRESH`) |

A function in none of them is read, or computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PROPERTIES = (
    "shape dtype device layout ndim requires_grad is_leaf grad_fn names output_nr itemsize nbytes _version "
    "is_cpu is_cuda is_xpu is_mps is_meta is_nested is_sparse is_sparse_csr is_quantized is_mkldnn is_vulkan "
    "is_ipu is_xla is_mtia is_maia is_hpu retains_grad"
)
_METHODS = (
    "size stride dim ndimension numel nelement element_size is_floating_point is_complex is_contiguous get_device "
    "is_inference is_conj is_neg is_signed has_names is_same_size storage_offset sym_size _is_view __len__ "
    "__hash__ is_non_overlapping_and_dense _is_zerotensor is_distributed"
)
_FUNCTIONS = (
    "numel is_floating_point is_complex is_inference is_conj is_neg is_signed get_device is_same_size is_nonzero_"
)


def _metadata() -> frozenset[Any]:
    functions: set[Any] = set()
    for name in _PROPERTIES.split():
        if hasattr(Tensor, name):
            functions.add(getattr(Tensor, name).__get__)
    functions |= {getattr(Tensor, name) for name in _METHODS.split() if hasattr(Tensor, name)}
    functions |= {getattr(torch, name) for name in _FUNCTIONS.split() if hasattr(torch, name)}
    return frozenset(functions)


METADATA = _metadata()  # answered by the shell of a tensor: no numbers are needed

# Steps that rules can follow, and that a loss usually takes: recorded, read when a statistic is asked for.
LAZY = words(
    """
    view reshape flatten unflatten contiguous clone transpose permute movedim moveaxis swapaxes swapdims squeeze
    unsqueeze t narrow select index_select __getitem__ split split_with_sizes chunk unbind float half bfloat16 to
    type type_as detach mul multiply __mul__ __rmul__ div divide true_divide __div__ __truediv__ neg negative
    __neg__ add sub subtract __add__ __radd__ __sub__ __rsub__ tanh sigmoid exp log_softmax softmax
    """
)
# Steps between the logits and values that a loss computes token by token. Recorded if a rule reads them token by token;
# other calls whose result is as wide as the logits are computed at once.
PUT_OFF = words(
    """
    abs absolute __abs__ square pow __pow__ __rpow__ sqrt rsqrt reciprocal log log2 log1p expm1 logaddexp xlogy clamp
    clip clamp_min clamp_max minimum maximum max min relu softplus where masked_fill masked_scatter
    nan_to_num isinf isnan isfinite logical_not logical_and logical_or __invert__ __and__ __or__ bitwise_not
    eq ne gt ge lt le __eq__ __ne__ __gt__ __ge__ __lt__ __le__ stack logsumexp kl_div mse_loss l1_loss smooth_l1_loss
    huber_loss softmax log_softmax view_as reshape_as expand_as scatter scatter_add sort argsort
    """
)
# Functions that take the numbers out of a tensor or pass it on: the plain tensor is needed.
NUMBER_FUNCTIONS = words(
    """
    __array__ __array_wrap__ __bool__ __complex__ __contains__ __deepcopy__ __dlpack__ __dlpack_device__ __float__
    __format__ __index__ __int__ __long__ __nonzero__ __reduce__ __reduce_ex__ __repr__ __setstate__
    _reduce_ex_internal _typed_storage allclose as_nested_tensor as_strided as_subclass backward cpu cuda data_ptr
    equal from_dlpack grad hpu ipu is_nonzero is_pinned is_set_to is_shared item mtia nested_tensor new_tensor numpy
    pin_memory share_memory_ storage storage_type to_dense to_mkldnn to_sparse tolist untyped_storage xpu
    """
)
LAZY_PROPERTIES = frozenset({"T", "mT", "data"})


def lazy(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func, "__self__", None).__name__ in LAZY_PROPERTIES  # type: ignore[union-attr]
    return name in LAZY


# Functions that read only the shape, dtype or device of a tensor.
ALIKE = words("zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty")
RESHAPED_AS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "type_as": lambda x, like: x.to(like.device, like.dtype),
    "to": lambda x, like: x.to(like.device, like.dtype),
    "view_as": lambda x, like: x.view(like.shape),
    "reshape_as": lambda x, like: x.reshape(like.shape),
    "expand_as": lambda x, like: x.expand(like.shape),
}


def takes_looks_only(func: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether the call reads only shape, dtype and device of the deferred logits among its arguments."""
    name, deferred = getattr(func, "__name__", ""), [isinstance(a, Tensor) and hasattr(a, "_deferred") for a in args]
    if name in ALIKE:
        return deferred[:1] == [True]
    return name in RESHAPED_AS and deferred == [False, True] and isinstance(args[0], Tensor) and not kwargs


def put_off(func: Callable[..., Any]) -> bool:
    return getattr(func, "__name__", "") in PUT_OFF


_BITWISE = words("__invert__ bitwise_not __and__ __or__")  # of numbers they are an error, but not on stand-ins


def fails_at_once(func: Callable[..., Any], args: tuple) -> bool:
    """Whether eager code raises at this call while fake tensors do not: a recorded call would raise too late."""
    name = getattr(func, "__name__", "")
    numbers = args[2] if name == "index_select" and len(args) > 2 else None
    if isinstance(numbers, Tensor) and (numbers.ndim > 1 or numbers.dtype not in (torch.int32, torch.int64)):
        return True
    if name in _BITWISE:
        return any(isinstance(a, Tensor) and a.is_floating_point() for a in args)
    return any(_misses(index, size) for index, size in _indexed(name, args))


def _indexed(name: str, args: tuple) -> Iterator[tuple[Tensor, int]]:
    """The tensors of numbers that a call looks up, and the size of the dimension of each."""
    if name in ("index_select", "scatter", "scatter_add") and len(args) > 2 and isinstance(args[1], int):
        sizes = args[0].shape
        if isinstance(args[2], Tensor) and -len(sizes) <= args[1] < len(sizes):
            yield args[2], sizes[args[1]]
    if name == "__getitem__":
        entries = args[1] if isinstance(args[1], tuple) else (args[1],)
        for entry, size in zip(entries, args[0].shape):
            if not isinstance(entry, (int, slice, Tensor)):
                return
            if isinstance(entry, Tensor):
                yield entry, size


def _misses(index: Tensor, size: int) -> bool:
    """Whether an index on the CPU has no entry. Other devices say so later, in eager code too."""
    if type(index) is not Tensor or index.device.type != "cpu" or not index.numel() or index.dtype is torch.bool:
        return False
    least, largest = index.aminmax()
    return bool(least < -size) or bool(largest >= size)


# Questions about a tensor's relations to others, which deferred logits do not have yet.
ALONE = frozenset({getattr(Tensor, name).__get__ for name in ("grad", "_base", "_backward_hooks", "_grad")})

# Functions that change a tensor's history or settings and no number: later calls depend on the change.
ASKS_FOR_GRADIENT = words("retain_grad register_hook register_post_accumulate_grad_hook")

# Writes whose names do not end in one underscore.
_INPLACE = ASKS_FOR_GRADIENT | words(
    """
    __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    __ilshift__ __irshift__ __setitem__ __set__ __delete__
    """
)


def _out_of_place() -> dict[str, Callable[..., Any]]:
    functions = {}
    for name in words(
        "add sub mul div true_divide neg exp tanh sigmoid clamp abs square masked_fill float half bfloat16"
    ):
        if hasattr(Tensor, f"{name}_"):
            functions[f"{name}_"] = getattr(Tensor, name)
    for name, of in (("__iadd__", "add"), ("__isub__", "sub"), ("__imul__", "mul"), ("__itruediv__", "div")):
        functions[name] = getattr(Tensor, of)
    return functions


OUT_OF_PLACE = _out_of_place()  # writes whose result is that of another function, in the tensor's own memory
# Calls whose result shares its memory with no argument.
FRESH = words(
    """
    mul multiply __mul__ __rmul__ div divide true_divide __truediv__ add __add__ __radd__ sub subtract __sub__ __rsub__
    neg negative __neg__ tanh sigmoid exp log_softmax softmax abs square pow log masked_fill where
    kl_div stack logsumexp
    """
)
_WITH_INPLACE_ARGUMENT = words("relu dropout leaky_relu elu silu mish celu selu")


def may_write_argument(func: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may change a tensor that it is given."""
    name = getattr(func, "__name__", "")
    if name in _INPLACE or (name.endswith("_") and not name.endswith("__")):
        return True
    if kwargs.get("out") is not None or kwargs.get("inplace") is True:
        return True
    return name in _WITH_INPLACE_ARGUMENT and any(a is True for a in args[1:])

"""Arguments for every op of torch that writes: recorded where torch's own samples run, made by type, or by hand.

An op that writes is called with what its counterpart that does not (``add_`` and ``add.out``: ``add``) was called with.
Samples are those of ``torch.testing._internal.common_methods_invocations.op_db``.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.op_samples import first_samples

# Parts of the names of ops that end the process when arguments do not fit: only recorded arguments, and those made by
# hand, will do for these.
FRAGILE = ("backward", "batch_norm", "conv", "cudnn", "embedding_bag", "fbgemm", "flash", "gru", "lstm", "miopen",
           "mkldnn", "nested", "pool", "quantize", "rnn", "rrelu", "scaled", "sobol", "sparse", "transformer",
           "upsample")  # fmt: skip
RESIZED = frozenset({"rrelu_with_noise"})  # whose kernels end the process where an output has another size
LARGEST = 400  # entries of an argument
KEPT = 6  # recorded calls of one op

Named = dict[str, Any]  # arguments by their names in the schema


@dataclass(eq=False)
class Call:
    """A call that runs: the op, its arguments by name, and the names of those that it writes to."""

    op: OpOverload
    arguments: Named
    written: tuple[str, ...]

    def split(self, arguments: Named | None = None) -> tuple[list[Any], Named]:
        """Positional and keyword arguments."""
        inputs = self.arguments if arguments is None else arguments
        schema = self.op._schema.arguments
        last = max((i for i, a in enumerate(schema) if not a.kwarg_only and a.name in inputs), default=-1)
        args = [inputs.get(a.name, a.default_value) for a in schema[: last + 1]]
        return args, {a.name: inputs[a.name] for a in schema if a.kwarg_only and a.name in inputs}


@dataclass(eq=False)
class Samples(TorchDispatchMode):
    """Calls of ops, by the name of the op and then by the names of its arguments.

    ``made_up``: whether arguments may be made by type where none were recorded; torch checks them, mostly.
    """

    made_up: bool = False
    known: dict[str, list[Named]] = field(default_factory=lambda: defaultdict(list))
    loose: dict[str, list[tuple[Any, ...]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        calls = self.known[schema.name]
        if len(calls) < KEPT and small((args, kwargs)):
            inputs = {a.name: args[i] for i, a in enumerate(schema.arguments) if i < len(args)}
            calls.append(copied({**inputs, **(kwargs or {})}))
        return func(*args, **(kwargs or {}))


def copied(value: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)


def small(value: Any) -> bool:
    tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return all(type(x) is Tensor and x.layout == torch.strided and x.numel() <= LARGEST for x in tensors)


def record(infos: Iterable[Any], each: int = 4, made_up: bool = False) -> Samples:
    """What ops are called with where the first samples of these ``OpInfo`` run on a CPU."""
    samples = Samples(made_up=made_up)
    for info in infos:
        dtypes = [torch.float32, *info.dtypes]
        dtype = next((d for d in dtypes if d in info.dtypes), None)
        if dtype is None or (info.is_factory_function and dtype is None):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = first_samples(info, dtype, 12)
                for sample in [s for s in result if small((s.input, s.args, s.kwargs))][:each]:
                    inputs = copied((sample.input, sample.args, sample.kwargs))
                    for name in {info.name, info.aten_name, *(alias.name for alias in info.aliases)}:
                        if len(samples.loose[name.replace(".", "_")]) < KEPT:
                            samples.loose[name.replace(".", "_")].append(inputs)
                    with samples, torch.no_grad():
                        info.op(sample.input, *sample.args, **sample.kwargs)
        except Exception:  # a sample that needs what this machine has not
            continue
    return samples


def ops_that_write() -> dict[str, OpOverload]:
    """Every op of torch's whose schema marks an argument as written, by its full name."""
    ops = {}
    for schema in torch._C._jit_get_all_schemas():
        if not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
            continue
        space, name = schema.name.split("::")
        if space.startswith("fusedhead"):
            continue
        try:
            op = getattr(getattr(getattr(torch.ops, space), name), schema.overload_name or "default")
        except (AttributeError, RuntimeError):
            continue
        ops[f"{schema.name}.{schema.overload_name or 'default'}"] = op
    return dict(sorted(ops.items()))


def marked(op: OpOverload) -> tuple[str, ...]:
    return tuple(a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def candidates(op: OpOverload, samples: Samples) -> Iterator[Named]:
    """Arguments that might do, the likeliest first."""
    schema = op._schema
    bare = schema.name.split("::")[1]
    outs = {a.name for a in schema.arguments if a.is_out}
    names = [schema.name]
    if not outs:
        names.append(schema.name.removesuffix("_"))
    if bare.endswith("_out"):
        names.append(schema.name.removesuffix("_out"))
    inputs = [a for a in schema.arguments if a.name not in outs]
    for name in names:
        for operands in samples.known.get(name, ()):
            bound = {a.name: operands[a.name] for a in inputs if a.name in operands}
            if all(a.name in bound or a.has_default_value() for a in inputs):
                yield bound
    for name in names:
        for first, args, kwargs in samples.loose.get(name.split("::")[1], ()):
            positional = dict(zip((a.name for a in inputs), (first, *args)))
            yield {**positional, **{k: v for k, v in kwargs.items() if any(k == a.name for a in inputs)}}
    yield from by_hand(bare, op._overloadname)
    if not samples.made_up or any(part in bare for part in FRAGILE) or not schema.name.startswith("aten"):
        return
    for shape in ((4, 4), (4,), (2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4, 4), ()):
        for dtype in (torch.float32, torch.int64):
            by_name = {}
            for a in inputs:
                value = by_type(a, shape, dtype)
                if value is not None or not a.has_default_value():
                    by_name[a.name] = value
            yield by_name


def by_type(argument: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A value of an argument's type; None where there is none, or where the default will do."""
    kind = str(argument.type)
    tensor = torch.ones(shape, dtype=dtype)
    table = {
        "Tensor": tensor, "int": 1, "number": 1, "float": 0.5, "bool": False, "List[Tensor]": [tensor, tensor.clone()],
        "List[int]": list(shape), "List[number]": [1.0, 1.0], "List[bool]": [True, True], "List[float]": [1.0, 1.0],
        "complex": 1.0, "List[Optional[Tensor]]": [torch.zeros(1, dtype=torch.int64)], "str": "mean",
        "Device": torch.device("cpu"),
    }  # fmt: skip
    if argument.has_default_value():
        return None
    if kind == "Tensor" and argument.name in ("indices", "index", "offsets"):
        return torch.zeros(shape, dtype=torch.int64)
    if kind == "Tensor" and argument.name in ("mask", "condition"):
        return torch.ones(shape, dtype=torch.bool)
    if kind == "int" and argument.name in ("dim", "dim0", "dim1", "axis0", "axis1"):
        return 0
    return table.get(kind)


def by_hand(name: str, overload: str) -> Iterator[Named]:
    """Arguments of ops whose arguments must fit together in ways that no type says."""
    ones, lists = torch.ones(4), lambda count: [[torch.ones(4), torch.ones(4)] for _ in range(count)]
    numbers = {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-8, "maximize": False}
    betas = {"beta1": 0.9, "beta2": 0.99, "amsgrad": False}
    if name in ("_fused_adam_", "_fused_adamw_", "_fused_adam", "_fused_adamw"):
        params, grads, first, second = lists(4)
        yield {"self": params, "grads": grads, "exp_avgs": first, "exp_avg_sqs": second, "max_exp_avg_sqs": [],
               "state_steps": [torch.ones(()), torch.ones(())], **numbers, **betas}  # fmt: skip
    if name in ("_fused_sgd_", "_fused_sgd"):
        params, grads = lists(2)
        sgd = {"weight_decay": 0.0, "momentum": 0.0, "lr": 0.1, "dampening": 0.0, "nesterov": False, "maximize": False}
        yield {"self": params, "grads": grads, "momentum_buffer_list": [], **sgd, "is_first_step": True}
    if name in ("_fused_adagrad_", "_fused_adagrad"):
        params, grads, sums = lists(3)
        yield {"self": params, "grads": grads, "state_sums": sums, "state_steps": [torch.ones(()), torch.ones(())],
               **numbers, "lr_decay": 0.0}  # fmt: skip
    if name.startswith("_amp_foreach_non_finite_check_and_unscale"):
        yield {"self": lists(1)[0], "found_inf": torch.zeros(1), "inv_scale": torch.full((1,), 0.5)}
    if name.startswith("_amp_update_scale"):
        yield {"self": torch.ones(1), "growth_tracker": torch.ones(1, dtype=torch.int32), "found_inf": torch.zeros(1),
               "scale_growth_factor": 2.0, "scale_backoff_factor": 0.5, "growth_interval": 2}  # fmt: skip
    if name.startswith("embedding_renorm"):
        yield {
            "self": torch.ones(4, 4),
            "indices": torch.zeros(2, dtype=torch.int64),
            "max_norm": 0.5,
            "norm_type": 2.0,
        }
    if name == "set_":
        yield {"source": ones} if overload == "source_Tensor" else {}
    if name.startswith("fill_diagonal"):
        yield {"self": torch.ones(4, 4), "fill_value": 2}
    if name.startswith("_native_batch_norm_legit") or name.startswith("_batch_norm_with_update"):
        yield {"input": torch.randn(4, 3), "weight": None, "bias": None, "running_mean": torch.zeros(3),
               "running_var": torch.ones(3), "training": True, "momentum": 0.5, "eps": 1e-5}  # fmt: skip
    if name.startswith("rrelu_with_noise"):
        yield {"self": torch.randn(4, 4), "noise": torch.ones(4, 4), "training": True}
    if name == "_index_put_impl_" or name == "index_put_":
        yield {"self": torch.ones(4, 4), "indices": [torch.tensor([0, 1])], "values": torch.ones(4)}


def complete(op: OpOverload, inputs: Named) -> Call | None:
    """A call with these arguments, its outputs made by running it; None where it does not run."""
    schema = op._schema
    outs = [a for a in schema.arguments if a.is_out]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = copied(inputs)
            if outs:
                result = functional(op, arguments)
                if len(result) != len(outs):
                    return None
                arguments |= {a.name: value for a, value in zip(outs, result)}
            if not small(arguments):
                return None
            call = Call(op, arguments, tuple(n for n in marked(op) if arguments.get(n) is not None))
            args, kwargs = call.split(copied(arguments))
            torch.manual_seed(0)
            op(*args, **kwargs)
            return call if call.written and any(isinstance(x, Tensor) for x in tree_leaves(arguments)) else None
    except Exception:
        return None


def functional(op: OpOverload, arguments: Named) -> list[Any]:
    """New tensors like the outputs of an op that takes them as arguments."""
    schema = op._schema
    outs = [a for a in schema.arguments if a.is_out]
    empty: Named = {}
    for a in outs:
        like = next((x for x in tree_leaves(arguments) if isinstance(x, Tensor)), torch.ones(()))
        empty[a.name] = [like.new_empty(0) for _ in range(2)] if "List" in str(a.type) else like.new_empty(0)
    space, name = schema.name.split("::")
    packet = getattr(getattr(torch.ops, space), name)
    pure = [getattr(packet, o) for o in packet.overloads()]
    inputs = copied(arguments)
    for other in pure:
        names = [a.name for a in other._schema.arguments]
        if not other._schema.is_mutable and set(inputs) <= set(names):
            try:
                result = other(**inputs)
            except Exception:
                continue
            results = list(result) if isinstance(result, (tuple, list)) and len(outs) > 1 else [result]
            return copied([x for x in results if x is not None])
    if name in RESIZED:
        return [torch.empty_like(inputs["self"])]
    args, kwargs = Call(op, {**inputs, **empty}, ()).split()
    op(*args, **kwargs)
    return list(empty.values())


def call_of(op: OpOverload, samples: Samples) -> Call | None:
    """A call of an op that writes, or None where no arguments were found."""
    for inputs in candidates(op, samples):
        call = complete(op, inputs)
        if call is not None:
            return call
    return None

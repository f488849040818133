"""The custom ops that run a token program on the logits of one or several heads.

    head_rows           one sweep: the program's results, [N, ...] each
    head_rows_backward  one sweep: the gradients of the inputs that need one
    head_rows_loss      both in one sweep, where the gradients of the results are known up to one factor: a scalar loss
                        that is linear in them (as `head_loss`)

A call whose logits take fewer bytes than ``keep_below`` returns its heads' products after its results, for its
backward, as Inductor would keep them: each product is then computed once. With a symbolic number of tokens each call
decides.

The program is text (`fusedhead.kernels.tokenwise.program`), so that a graph with these ops depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedhead.kernels.tokenwise import engine as tokenwise_engine
from fusedhead.kernels.tokenwise.compilation import above_autograd_keys
from fusedhead.kernels.tokenwise.program import read, run
from fusedhead.lowering import ranges
from fusedhead.lowering.autograd import DIFFERENTIATED_ONCE, scaled, upstream_scale
from fusedhead.lowering.ops import without_autocast
from fusedhead.lowering.plan.tokenwise import RowPlan, row_plan
from fusedhead.lowering.registration import register_op
from fusedhead.lowering.retention import keeps, kept_rows

TOKEN_SCHEMAS = {
    "head_rows": "(Tensor[] tensors, str program, int memory, int keep_below=0) -> Tensor[]",
    "head_rows_backward": "(Tensor[] upstream, Tensor[] tensors, str program, int memory, bool[] needs, "
    "Tensor[]? products=None) -> Tensor[]",
    "head_rows_loss": "(Tensor[] tensors, Tensor[] coefficients, str program, int memory, bool[] needs) -> Tensor[]",
}


def _first_head(schema: str) -> ranges.FindOperands:
    """The operands of the first head of a program, from the arguments of an op."""
    names = [argument.split()[1] for argument in schema.partition(" ->")[0].strip("()").split(", ")]
    at_tensors, at_program = names.index("tensors"), names.index("program")

    def operands(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        h, w = tokenwise_engine.head_inputs(read(args[at_program]))[0]
        return args[at_tensors][h], args[at_tensors][w]

    return operands


def windows_of(
    tensors: Sequence[Tensor], program: str, memory: int, tokens: int, needs: Sequence[bool] | None = None
) -> RowPlan:
    """The windows of a program for a number of tokens, with gradients of the inputs that ``needs`` flags.

    Of the tensors only dtypes and sizes other than the tokens are read.
    """
    parsed = read(program)
    inputs = tokenwise_engine.head_inputs(parsed)
    reached = [needs is not None and (needs[h] or needs[w]) for h, w in inputs]
    vocab, dtype = max(((len(tensors[w]), tensors[w].dtype) for _, w in inputs), key=lambda s: s[0] * s[1].itemsize)
    device, calls = tensors[inputs[0][0]].device.type, len(parsed.lines)
    return row_plan((tokens, vocab), dtype, device, heads=reached, calls=calls, memory=memory)


def _plan(
    tensors: list[Tensor], program: str, memory: int, needs: Sequence[bool] | None = None
) -> tuple[int, bool, bool, int]:
    tokens = len(tensors[tokenwise_engine.head_inputs(read(program))[0][0]])
    return windows_of(tensors, program, memory, tokens, needs)[:4]


def logits_bytes(tensors: Sequence[Tensor], program: str) -> int:
    """The bytes that the products of all heads take for one token."""
    return sum(tensors[w].shape[0] * tensors[w].element_size() for _, w in tokenwise_engine.head_inputs(read(program)))


def _kept(tensors: list[Tensor], program: str, keep_below: int) -> list[Tensor]:
    """Empty tensors for the products that a call keeps; none without a limit."""
    if not keep_below:
        return []
    heads = [(tensors[h], tensors[w]) for h, w in tokenwise_engine.head_inputs(read(program))]
    rows = kept_rows(heads[0][0].shape[0], logits_bytes(tensors, program), keep_below)
    return [h.new_empty((rows, w.shape[0])) for h, w in heads]


def _rows(tensors: list[Tensor], program: str, memory: int, keep_below: int = 0) -> list[Tensor]:
    chosen, kept = _plan(tensors, program, memory)[:2], _kept(tensors, program, keep_below)
    n = len(tensors[tokenwise_engine.head_inputs(read(program))[0][0]])
    products = [z[:n] for z in kept] if keeps(n, logits_bytes(tensors, program), keep_below) else None
    with without_autocast(tensors[0].device):
        return [*tokenwise_engine.head_rows(read(program), tensors, *chosen, products=products), *kept]


def _rows_fake(tensors: list[Tensor], program: str, memory: int, keep_below: int = 0) -> list[Tensor]:
    # above autograd, where composite ops decompose as at run time: below it, the fake result of nll_loss has no
    # dimension for a symbolic size, for any reduction
    with without_autocast(tensors[0].device), torch.no_grad():
        results = above_autograd_keys(lambda: run(read(program), tensors), otherwise=lambda function: function())
        results = [torch.empty_like(r, memory_format=torch.contiguous_format) for r in results]
    return results + _kept(tensors, program, keep_below)


def _rows_backward(
    upstream: list[Tensor],
    tensors: list[Tensor],
    program: str,
    memory: int,
    needs: list[bool],
    products: list[Tensor] | None = None,
) -> list[Tensor]:
    gradients, chosen, parsed = _none_if_absent(upstream), _plan(tensors, program, memory, needs), read(program)
    n = len(tensors[tokenwise_engine.head_inputs(parsed)[0][0]])
    kept = [z[:n] for z in products] if products and len(products[0]) >= n else None
    with without_autocast(tensors[0].device):
        results = tokenwise_engine.head_rows_backward(parsed, gradients, tensors, needs, *chosen, products=kept)
    return [g for g in results if g is not None]


def _rows_backward_fake(
    upstream: list[Tensor],
    tensors: list[Tensor],
    program: str,
    memory: int,
    needs: list[bool],
    products: list[Tensor] | None = None,
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in zip(tensors, needs) if need]


def _none_if_absent(gradients: list[Tensor]) -> list[Tensor | None]:
    """Gradients of results, None for 0-d ones, which represent absent gradients."""
    return [g if g.dim() else None for g in gradients]


def _rows_loss(
    tensors: list[Tensor], coefficients: list[Tensor], program: str, memory: int, needs: list[bool]
) -> list[Tensor]:
    weights, chosen = _none_if_absent(coefficients), _plan(tensors, program, memory, needs)
    with without_autocast(tensors[0].device):
        results, grads = tokenwise_engine.head_rows_loss(read(program), weights, tensors, needs, *chosen)
    return [*results, *(g for g in grads if g is not None)]


def _rows_loss_fake(
    tensors: list[Tensor], coefficients: list[Tensor], program: str, memory: int, needs: list[bool]
) -> list[Tensor]:
    results = _rows_fake(tensors, program, memory)
    return results + _rows_backward_fake(coefficients, tensors, program, memory, needs)


def _setup_loss(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    _, coefficients, program, _, ctx.computed = inputs
    ctx.results = len(read(program).results)
    grads = output[ctx.results :]
    ctx.save_for_backward(*coefficients, *grads)
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)


def _backward_loss(ctx: Any, grads: list[Tensor | None]) -> tuple:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[0]
    coefficients, computed = saved[: ctx.results], iter(saved[ctx.results :])
    if any(need and not present for need, present in zip(needs, ctx.computed)):
        raise RuntimeError("an input requires a gradient but head_rows_loss was called without its need")
    pairs = [(g, c) for g, c in zip(grads, coefficients) if g is not None and c.dim()]
    gradients = [next(computed) if present else None for present in ctx.computed]
    if not pairs or not any(needs):
        return [None] * len(needs), [None] * len(coefficients), None, None, None
    scaled_gradients = scaled([d if need else None for d, need in zip(gradients, needs)], upstream_scale(pairs))
    return scaled_gradients, [None] * len(coefficients), None, None, None


def _setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    tensors, ctx.program, ctx.memory, _ = inputs
    ctx.results = len(read(ctx.program).results)
    ctx.given, products = len(tensors), output[ctx.results :]
    ctx.save_for_backward(*tensors, *products)
    ctx.mark_non_differentiable(*products)
    ctx.dtypes = [r.dtype for r in output[: ctx.results]]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    saved = ctx.saved_tensors  # read once: a checkpoint recomputes them at each access
    tensors, products = list(saved[: ctx.given]), list(saved[ctx.given :])
    needs = list(ctx.needs_input_grad[0])
    absent = tensors[0].new_empty(())  # 0-d, as no gradient of rows is
    upstream = [absent if g is None or not t.is_floating_point else g for g, t in zip(grads, ctx.dtypes)]
    arguments = (upstream, tensors, ctx.program, ctx.memory, needs, *([products] if products else []))
    gradients = iter(torch.ops.fusedhead.head_rows_backward(*arguments))
    rest = (None,) * (len(ctx.needs_input_grad) - 1)  # a last argument that has its default is not among the inputs
    return [next(gradients) if need else None for need in needs], *rest


for _name, _run, _fake, _autograd in (
    ("head_rows", _rows, _rows_fake, (_setup, _backward)),
    ("head_rows_backward", _rows_backward, _rows_backward_fake, DIFFERENTIATED_ONCE),
    ("head_rows_loss", _rows_loss, _rows_loss_fake, (_setup_loss, _backward_loss)),
):
    _run = ranges.ranged(_name, _first_head(TOKEN_SCHEMAS[_name]), _run)
    register_op(_name, TOKEN_SCHEMAS[_name], _run, _fake, _autograd)

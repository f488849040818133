"""The engine of token programs: runs a program and its gradient in windows of tokens.

    forward     results = program(z, ...),  z = h wᵀ                         2 N V D FLOP a head
    backward    dz = vjp of the program,  dh = dz w,  dw += dzᵀ h            6 N V D, or 4 N V D where z was kept
    both        in one sweep, where the results' gradients are known first   6 N V D

Inputs: h [N, D], w [V, D] of one floating dtype, and the program's other inputs. Outputs: the program's results
[N, ...], dh and dw in the dtypes of h and w. Never in memory: a tensor [N, V], unless the caller asks to keep z. One
window holds the values of the program's ops for its tokens. Results are rounded as in the program. The dz
of ``group`` windows lie in one buffer, and one product adds them to dw: dw is read and written once a group, in
float32 and rounded once, or in its own dtype with ``narrow_sums``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fusedhead.kernels.tokenwise.compilation import RowFunction, made_once, windows
from fusedhead.kernels.tokenwise.gradient_sums import GradientSums
from fusedhead.kernels.tokenwise.program import Ref, RowProgram, head_product, run
from fusedhead.kernels.transform.bias_rounding import rounded_bias
from fusedhead.kernels.transform.transform import parse


def row_inputs(program: RowProgram) -> frozenset[int]:
    """The indices of the inputs that are cut into windows: a window reads only its own rows of them."""
    refs = (a for line in program.lines for a in (*line.args, *(v for _, v in line.kwargs)))
    flat = (e for a in refs for e in ((a,) if isinstance(a, Ref) or not isinstance(a, tuple) else a))
    return frozenset(e.at for e in flat if isinstance(e, Ref) and e.kind == "r")


def head_inputs(program: RowProgram) -> list[tuple[int, int]]:
    """The indices (h, w) among the inputs, for every head in order."""
    return [(line.args[0].at, line.args[1].at) for line in program.heads]


def biases(program: RowProgram, tensors: Sequence[Tensor]) -> list[tuple[int, int] | None]:
    """(input, row of it) of the bias that each head's product includes, in order; None for a product without bias."""
    computed: list[tuple[int, int] | None] = []
    for h, _, cols, _, transform, _ in (line.args for line in program.heads):
        bias = rounded_bias(parse(transform), tensors[h.at].dtype)
        computed.append(None if bias is None else (cols.at, bias))
    return computed


def _forward(program: RowProgram, kept: bool) -> RowFunction:
    """A function of (inputs..., and with ``kept`` also products...) that returns the program's results."""
    count = len(program.heads) if kept else 0

    def results(inputs: list[Tensor]) -> list[Tensor]:
        tensors, products = inputs[: len(inputs) - count], inputs[len(inputs) - count :]
        with torch.no_grad():
            return run(program, tensors, products if kept else None)

    return results


def _vjp(
    program: RowProgram,
    total: int,
    differentiable: tuple[bool, ...],
    wanted: tuple[int, ...],
    heads: tuple[bool, ...],
    keep: bool,
) -> RowFunction:
    """A function of (inputs..., products..., upstream..., and further arguments) that returns gradients.

    There are ``total`` inputs. Returned are the gradients of the inputs ``wanted`` and of the products whose flag in
    ``heads`` is set. With ``keep`` the program's results come before them.
    """
    count = len(program.heads)

    def gradients(inputs: list[Tensor]) -> list[Tensor]:
        tensors, products = list(inputs[:total]), list(inputs[total : total + count])
        upstream = inputs[total + count : total + count + sum(differentiable)]
        with torch.enable_grad():
            for i in wanted:
                tensors[i] = tensors[i].detach().requires_grad_()
            products = [z.detach().requires_grad_(need) for z, need in zip(products, heads)]
            results = run(program, tensors, products)
            out = [r for r, used in zip(results, differentiable) if used]
            pairs = [(r, g) for r, g in zip(out, upstream) if r.requires_grad]
            leaves = [tensors[i] for i in wanted] + [z for z, need in zip(products, heads) if need]
            kept = [r.detach() for r in results] if keep else []
            if not pairs:
                return kept + [torch.zeros_like(x) for x in leaves]
            grads = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs], materialize_grads=True)
        return [*kept, *grads]

    return gradients


def _window(tensors: Sequence[Tensor], rows: frozenset[int], i: slice) -> list[Tensor]:
    return [t[i] if k in rows else t for k, t in enumerate(tensors)]


def head_rows(
    program: RowProgram,
    tensors: Sequence[Tensor],
    tokens: int,
    compile_whole: bool = False,
    products: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The program's results, each [N, ...].

    A window has ``tokens`` rows; with ``compile_whole`` whole windows run compiled. ``products``, one [N, V] per head
    in order, are filled with h wᵀ for a later `head_rows_backward`.
    """
    rows = row_inputs(program)
    n = tensors[head_inputs(program)[0][0]].shape[0]
    results: list[Tensor] = []
    key = ("forward", program, products is not None)
    for i, compiled in windows(n, tokens, key, compile_whole) if n else [(slice(0, 0), False)]:
        given = _window(tensors, rows, i)
        if products is not None:
            kept = [z[i] for z in products]
            for z, head in zip(kept, program.heads):
                z.copy_(head_product(head, given))
            given += kept
        function = _forward(program, products is not None)
        if compiled:
            function = made_once(key, function, given, True, i.stop - i.start)
        computed = function(given)
        if not results:
            results = [r.new_empty((n, *r.shape[1:])) for r in computed]
        for into, r in zip(results, computed):
            into[i] = r
    return results


def head_rows_backward(
    program: RowProgram,
    upstream: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    tokens: int,
    compile_whole: bool = False,
    narrow_sums: bool = False,
    group: int = 1,
    products: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """The gradients of the inputs that need one, in their dtypes; None for the others.

    Sums over windows are kept in float32 (float64 for float64), or in the input's dtype with ``narrow_sums``. The
    gradients of ``group`` windows of logits are multiplied at once. ``products`` are the ones that `head_rows` filled;
    without them h wᵀ is computed again.
    """
    return _swept(program, upstream, tensors, needs, tokens, compile_whole, narrow_sums, group, False, products)[1]


def head_rows_loss(
    program: RowProgram,
    coefficients: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    tokens: int,
    compile_whole: bool = False,
    narrow_sums: bool = False,
    group: int = 1,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results as of `head_rows` and gradients as of `head_rows_backward` in one sweep.

    ``coefficients`` are the gradients of the results, which have to be known beforehand.
    """
    if not tensors[head_inputs(program)[0][0]].shape[0]:
        nothing = head_rows(program, tensors, tokens)
        return nothing, head_rows_backward(program, coefficients, tensors, needs, tokens)
    return _swept(program, coefficients, tensors, needs, tokens, compile_whole, narrow_sums, group, True)


def _groups(found: Iterable[tuple[slice, bool]], tokens: int) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
    """(tokens of a group, its windows) for windows in order: as many in a group as have ``tokens`` tokens at most."""
    together: list[tuple[slice, bool]] = []
    for i, compiled in found:
        if together and i.stop - together[0][0].start > tokens:
            yield slice(together[0][0].start, together[-1][0].stop), together
            together = []
        together.append((i, compiled))
    if together:
        yield slice(together[0][0].start, together[-1][0].stop), together


def _swept(
    program: RowProgram,
    upstream: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    tokens: int,
    compile_whole: bool,
    narrow_sums: bool,
    group: int,
    keep: bool,
    known: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(the results, [] unless ``keep``; the gradients), one window of tokens after the other."""
    rows, heads, added = row_inputs(program), head_inputs(program), biases(program, tensors)
    parts = {at for pair in heads for at in pair}
    n = tensors[heads[0][0]].shape[0]
    differentiable = tuple(g is not None for g in upstream)
    wanted = tuple(i for i, need in enumerate(needs) if need and i not in parts)
    live = tuple(needs[h] or needs[w] or (b is not None and needs[b[0]]) for (h, w), b in zip(heads, added))
    sums = GradientSums(tensors, needs, rows, narrow_sums, frozenset(w for _, w in heads))
    key = ("vjp", program, differentiable, wanted, live, keep)
    results: list[Tensor] = []
    most, buffer = min(n, group * tokens), None
    buffers = [tensors[h].new_empty((most, len(tensors[w]))) if on else None for (h, w), on in zip(heads, live)]
    for together, each in _groups(windows(n, tokens, key, compile_whole), most):
        for i, compiled in each:
            given = _window(tensors, rows, i)
            products = [z[i] for z in known] if known else [head_product(head, given) for head in program.heads]
            seen = [g[i] for g in upstream if g is not None]
            into = [dz[i.start - together.start : i.stop - together.start] for dz in buffers if dz is not None]
            everything = [*given, *products, *seen, *into]
            written = tuple(range(len(everything) - len(into), len(everything)))
            vjp = _vjp(program, len(tensors), differentiable, wanted, live, keep)
            computed = made_once(key, vjp, everything, compiled, i.stop - i.start, written)(everything)
            del products, everything, into
            if keep:
                kept, computed = computed[: len(program.results)], computed[len(program.results) :]
                results = results or [r.new_empty((n, *r.shape[1:])) for r in kept]
                for result, r in zip(results, kept):
                    result[i] = r
            for at, gradient in zip(wanted, computed):
                sums.add(at, i, gradient)
        for pair, bias, buffer in zip(heads, added, buffers):
            if buffer is not None:
                sums.add_head(pair, bias, together, buffer[: together.stop - together.start])
    del buffers, buffer
    return results, sums.finish()

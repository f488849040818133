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

from fusedhead.kernels.contract import stat_dtype
from fusedhead.kernels.gemm import gemm
from fusedhead.kernels.narrow_sum import NarrowSum
from fusedhead.kernels.tokenwise.compilation import RowFunction, made_once, windows
from fusedhead.kernels.tokenwise.program import Ref, RowProgram, head_product, run
from fusedhead.kernels.torch_engine.blocks import cuts
from fusedhead.kernels.transform.bias_rounding import rounded_bias
from fusedhead.kernels.transform.transform import parse

PRODUCT_BYTES = 256 << 20  # the largest temporary dzᵀ h that is added to dw on a CPU


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
    """A function of (inputs..., products..., upstream..., anything else...) that returns gradients.

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


def adds_in_epilogue(device: torch.device) -> bool:
    """Whether a product of two bytes adds to a float32 sum without being rounded first."""
    return device.type == "cuda"


class _Sums:
    """Gradients that grow window by window: rows of some inputs, sums over the tokens of the others."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        rows: frozenset[int],
        narrow: bool,
        weights: frozenset[int],
    ) -> None:
        self.tensors, self.rows = tensors, rows
        self.weights = {
            at: NarrowSum(
                torch.empty_like(w, memory_format=torch.contiguous_format), w.dtype if narrow else stat_dtype(w.dtype)
            )
            for at, w in enumerate(tensors)
            if needs[at] and at in weights
        }
        self.begun: set[tuple[int, int]] = set()  # (input, first row): where something was added before
        self.into = [
            t.new_empty(t.shape, dtype=t.dtype if i in rows or narrow else stat_dtype(t.dtype))
            if need and i not in weights
            else None
            for i, (t, need) in enumerate(zip(tensors, needs))
        ]

    def _target(self, at: int, i: slice) -> tuple[Tensor | None, bool]:
        """(where to add the gradient of input ``at`` from the tokens ``i``, whether there is something already)."""
        into = self.into[at]
        if into is None:
            return None, False
        first = (at, i.start if at in self.rows else 0)
        begun = first in self.begun
        self.begun.add(first)
        return into[i] if at in self.rows else into, begun

    def add(self, at: int, i: slice, gradient: Tensor) -> None:
        into, begun = self._target(at, i)
        if into is not None:
            (into.add_ if begun else into.copy_)(gradient)

    def add_bias(self, at: int, row: int, i: slice, dz: Tensor) -> None:
        into = self.into[at]
        if into is not None:
            if (at, 0) not in self.begun:
                self.begun.add((at, 0))
                into.zero_()
            into[row].add_(dz.sum(0, dtype=into.dtype))

    def add_head(self, head: tuple[int, int], bias: tuple[int, int] | None, i: slice, dz: Tensor) -> None:
        """dh, dw and db of the inputs ``head`` and ``bias``: dz w, dzᵀ h and Σ dz for the tokens ``i``."""
        h, w = head
        into, begun = self._target(h, i)
        if into is not None:
            gemm(dz, self.tensors[w], into, add=begun)
        self.add_weight(w, dz, self.tensors[h][i])
        if bias is not None:
            self.add_bias(*bias, i, dz)

    def add_weight(self, at: int, dz: Tensor, h: Tensor) -> None:
        """dw += dzᵀ h."""
        if at not in self.weights:
            return
        begun = (at, 0) in self.begun
        self.begun.add((at, 0))
        for v, into in self.weights[at].pieces(slice(0, dz.shape[1])):
            if adds_in_epilogue(dz.device):
                gemm(dz[:, v].t(), h, into, add=begun)
                continue
            for part in cuts(len(into), max(1, PRODUCT_BYTES // max(1, into.element_size() * into.shape[1]))):
                some = dz[:, v.start + part.start : v.start + part.stop]
                if into.dtype == dz.dtype:
                    gemm(some.t(), h, into[part], add=begun)
                else:
                    (into[part].add_ if begun else into[part].copy_)(some.t() @ h)

    def finish(self) -> list[Tensor | None]:
        """The gradients in the inputs' dtypes, zeros where nothing was added."""
        touched = {at for at, _ in self.begun}
        found: list[Tensor | None] = []
        for at, (into, t) in enumerate(zip(self.into, self.tensors)):
            if into is None and at not in self.weights:
                found.append(None)
            elif at not in touched:
                found.append(torch.zeros_like(t))
            else:
                found.append(self.weights[at].finish() if into is None else into.to(t.dtype))
        return found


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
    sums = _Sums(tensors, needs, rows, narrow_sums, frozenset(w for _, w in heads))
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

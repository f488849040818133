"""What happens to the logits between the product and the loss: steps along the vocabulary, moves of rows, traps.

Every production takes the writer and the logits and returns the logits after it. Moves of rows are written for the
labels and the mask too, so that they stay aligned.
"""

from __future__ import annotations

from dataclasses import replace

from tests.fuzz.writer import Logits, Rows, Writer, renamed


def out_of_place(w: Writer, z: Logits, expression: str) -> Logits:
    return renamed(z, w.let("z", expression))


def per_class(w: Writer, z: Logits, *, grad: float, last: bool = False) -> str:
    """A vector along the vocabulary, shaped to broadcast to the logits."""
    name = w.input(
        "c", f"(1 + 0.3 * torch.randn({z.vocab})).to(dtype)" + (".requires_grad_()" if w.chance(grad) else "")
    )
    if z.class_dim == z.rank - 1:
        return w.pick([name, f"{name}.view({', '.join(['1'] * (z.rank - 1) + ['-1'])})"])
    return f"{name}.view({', '.join('-1' if d == z.class_dim else '1' for d in range(z.rank))})"


def per_token(w: Writer, z: Logits) -> str:
    """A positive vector along the tokens, shaped to broadcast to the logits."""
    return f"({z.rows.m} + 0.5).unsqueeze({z.class_dim})"


def scale(w: Writer, z: Logits) -> Logits:
    kinds = [
        f"{z.name} * 0.7",
        f"{z.name} / 1.3",
        f"1.2 * {z.name}",
        f"torch.mul({z.name}, 0.5)",
        f"torch.div({z.name}, 2)",
    ]
    kinds += [f"{z.name} * 30.0"] if w.chance(0.2) else []
    kinds += [f"-{z.name}", f"{z.name} + 0.25", f"{z.name} - 1", f"2 - {z.name}", f"{z.name}.div(0.8)"]
    return out_of_place(w, z, w.pick(kinds))


def learned_scale(w: Writer, z: Logits) -> Logits:
    s = w.input("s", "torch.full((), 0.3).to(dtype)" + (".requires_grad_()" if w.chance(0.8) else ""))
    return out_of_place(
        w, z, w.pick([f"{z.name} * {s}.exp()", f"{z.name} / ({s} + 1)", f"{s} * {z.name}", f"{z.name} - {s}"])
    )


def class_step(w: Writer, z: Logits) -> Logits:
    vector = per_class(w, z, grad=0.5)
    return out_of_place(
        w, z, w.pick([f"{z.name} + {vector}", f"{z.name} * {vector}", f"{vector} + {z.name}", f"{z.name} - {vector}"])
    )


def token_step(w: Writer, z: Logits) -> Logits:
    vector = per_token(w, z)
    return out_of_place(w, z, w.pick([f"{z.name} / {vector}", f"{z.name} * {vector}", f"{z.name} + {vector}"]))


def cap(w: Writer, z: Logits) -> Logits:
    n = z.name
    kinds = [
        f"3.0 * torch.tanh({n} / 3.0)",
        f"torch.tanh({n} / 4) * 4",
        f"5 * torch.sigmoid(({n} + 1) / 2.5)",
        f"{n}.tanh()",
    ]
    return out_of_place(w, z, w.pick([*kinds, f"({n} * 0.5).sigmoid() * 4"]))


def cast(w: Writer, z: Logits) -> Logits:
    kind = w.weighted(
        [(5, ".float()"), (3, ".to(torch.float32)"), (1, ".to(torch.bfloat16)"), (1, ".type_as({})"), (1, ".to('cpu')")]
    )
    return out_of_place(w, z, z.name + kind.format(z.rows.m))


def inplace(w: Writer, z: Logits) -> Logits:
    """Changes the logits where they lie."""
    n = z.name
    vector = per_class(w, z, grad=0.0)
    w.line(
        w.pick(
            [f"{n} /= 1.5", f"{n} *= 0.5", f"{n}.div_(1.25)", f"{n}.mul_(0.8)", f"{n} += 0.5", f"{n}.tanh_()",
             f"{n} *= {vector}", f"{n} += {vector}", f"{n}.add_({vector})", f"torch.mul({n}, 0.5, out={n})"
             if False else f"{n}.clamp_(-5, 5)"]
        )
    )  # fmt: skip
    return z


def setitem(w: Writer, z: Logits) -> Logits:
    """Masks classes, or rows, by assignment."""
    if z.class_dim == z.rank - 1:
        minimum = f"torch.finfo({z.name}.dtype).min"
        w.line(w.pick([f"{z.name}[..., 0] = -5.0", f"{z.name}[..., {z.vocab - 2}:] = -3.0", f"{z.name}[0] = 0.0",
                       f"{z.name}[..., [1, 2]] = -float('inf')", f"{z.name}[:, 1:] = 0.5",
                       f"{z.name}[..., torch.arange({z.vocab}) % 3 == 1] = {minimum}"]))  # fmt: skip
    else:
        w.line(f"{z.name}[:, 1] = -5.0")
    return z


def column_mask(w: Writer, z: Logits) -> Logits:
    if z.class_dim != z.rank - 1:
        return z
    n, v = z.name, z.vocab
    kinds = [f"{n}.masked_fill(torch.arange({v}) == 1, -1e4)", f"torch.where(torch.arange({v}) < {v - 1}, {n}, -1e4)"]
    kinds += [f"{n} + torch.where(torch.arange({v}) < {v - 1}, 0.0, -1e4)", f"{n}.clamp(min=-4)"]
    kinds += [f"{n}.masked_fill(torch.arange({v}) == 1, -float('inf'))", f"{n}.nan_to_num(nan=0.0)"]
    kinds += [f"{n}.masked_fill({n} < {n}.topk(3, -1).values[..., -1:], -1e4)"]
    kinds += [f"torch.where(({z.rows.m} > 0.5).unsqueeze(-1), {n}, {n} * 0.5)"]
    return out_of_place(w, z, w.pick(kinds))


def vocab_slice(w: Writer, z: Logits) -> Logits:
    if z.class_dim != z.rank - 1 or z.vocab < 4:
        return z
    kind = w.weighted([(4, "head"), (1, "middle"), (1, "step")])
    cut, left = {"head": ("[..., :-1]", z.vocab - 1), "middle": ("[..., 1:-1]", z.vocab - 2),
                        "step": ("[..., ::2]", (z.vocab + 1) // 2)}[kind]  # fmt: skip
    y = w.let("y", f"{z.rows.y}.clamp(max={left - 1})")
    return replace(z, name=w.let("z", z.name + cut), vocab=left, rows=replace(z.rows, y=y))


def move(w: Writer, z: Logits, on_logits: str, on_rows: str, rank: int, class_dim: int) -> Logits:
    """A move of rows, on the logits and on what is aligned with them."""
    rows = Rows(w.let("y", z.rows.y + on_rows), w.let("m", z.rows.m + on_rows), rank - 1)
    return replace(z, name=w.let("z", z.name + on_logits), rank=rank, class_dim=class_dim, rows=rows)


def flatten(w: Writer, z: Logits) -> Logits:
    if z.rank != 3 or z.class_dim != 2:
        return z
    v = z.vocab
    spelled = [
        f".view(-1, {v})",
        f".reshape(-1, {v})",
        f".reshape(-1, {z.name}.size(-1))",
        ".flatten(0, 1)",
        f".contiguous().view(-1, {v})",
    ]
    return move(w, z, w.pick(spelled[1:4] if w.chance(0.8) else spelled), ".reshape(-1)", 2, 1)


def shift(w: Writer, z: Logits) -> Logits:
    """The shift of a language model: all but the last position, with the labels that follow."""
    if z.rank != 3 or z.class_dim != 2 or w.sizes["T"] < 2:
        return z
    contiguous = ".contiguous()" if w.chance(0.4) else ""
    rows = Rows(w.let("y", f"{z.rows.y}[..., 1:]{contiguous}"), w.let("m", f"{z.rows.m}[..., 1:]"), 2)
    return replace(z, name=w.let("z", f"{z.name}[..., :-1, :]{contiguous}"), rows=rows)


def pick_rows(w: Writer, z: Logits) -> Logits:
    """A part of the rows, along the first dimension."""
    if z.class_dim == 0:
        return z
    cut = w.pick(["[1:]", "[-2:]", "[::2]", "[:-1]", "[[0, 0]]", "[torch.tensor([0])]", ".narrow(0, 0, 1)", "[:1]",
                  ".index_select(0, torch.tensor([0, 0]))", ".flip(0)", ".roll(1, 0)", ".repeat_interleave(2, 0)",
                  "[[0, -1]]", "[-1:]"])  # fmt: skip
    return move(w, z, cut, cut, z.rank, z.class_dim)


def select_row(w: Writer, z: Logits) -> Logits:
    if z.rank != 3 or z.class_dim != 2:
        return z
    dim, index = w.pick([(0, 0), (1, -1), (1, 0), (0, -1)])
    cut = f".select({dim}, {index})" if w.chance(0.5) else (f"[{index}]" if dim == 0 else f"[:, {index}]")
    return move(w, z, cut, cut, 2, 1)


def classes_second(w: Writer, z: Logits) -> Logits:
    if z.rank != 3 or z.class_dim != 2:
        return z
    kind = w.pick([".transpose(1, 2)", ".permute(0, 2, 1)", ".transpose(-1, -2)", ".movedim(-1, 1)", ".mT"])
    return renamed(z, w.let("z", z.name + kind), class_dim=1)


def swap_rows(w: Writer, z: Logits) -> Logits:
    if z.rank != 3 or z.class_dim != 2:
        return z
    return move(w, z, ".transpose(0, 1)", ".transpose(0, 1)", 3, 2)


def add_dimension(w: Writer, z: Logits) -> Logits:
    if z.class_dim != z.rank - 1 or z.rank > 3:
        return z
    return move(w, z, ".unsqueeze(0)", ".unsqueeze(0)", z.rank + 1, z.rank)


def drop_dimension(w: Writer, z: Logits) -> Logits:
    """A dimension put in and taken out again."""
    if z.class_dim != z.rank - 1:
        return z
    return renamed(z, w.let("z", f"{z.name}.unsqueeze(1).squeeze(1)"))


def detach(w: Writer, z: Logits) -> Logits:
    return out_of_place(w, z, w.pick([f"{z.name}.detach()", f"{z.name}.data", f"{z.name}.clone()"]))


def near_miss(w: Writer, z: Logits) -> Logits:
    """Looks like a step of a head, and is none."""
    n = z.name
    other = w.pick([f"torch.roll({n}, 1, {z.class_dim})", f"{n} - {n}.mean({z.class_dim}, keepdim=True)", f"{n}.relu()",
                    f"{n}.sort({z.class_dim}).values",
                    f"{n} + {n}.detach()", f"{n} * {n}", f"{n}.exp().clamp(max=50)",
                    f"{n}.reshape(-1).reshape({n}.shape)",
                    f"{n} + torch.linspace(0, 1, {n}.numel()).view({n}.shape)", f"F.dropout({n}, 0.2)",
                    f"{n}.cumsum({z.class_dim})", f"F.gelu({n})",
                    f"{n} - 0.5 * {n}.logsumexp({z.class_dim}, keepdim=True)",
                    f"{n} + {n}.std({z.class_dim}, keepdim=True)", f"F.layer_norm({n}, {n}.shape[-1:])",
                    f"{n} - {n}.amax({z.class_dim}, keepdim=True)", f"F.pad({n}, (0, 0)) * 1"])  # fmt: skip
    return out_of_place(w, z, other)


STEPS = [
    (6, scale), (2, learned_scale), (4, class_step), (2, token_step), (4, cap), (5, cast), (2, inplace), (1, setitem),
    (1, column_mask), (2, vocab_slice), (1, detach), (1, near_miss),
]  # fmt: skip
MOVES = [
    (6, flatten), (4, shift), (3, pick_rows), (2, select_row), (2, classes_second), (1, swap_rows), (1, add_dimension),
    (1, drop_dimension),
]  # fmt: skip

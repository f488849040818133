"""Where a program's logits come from: hidden states, weights, biases, and every spelling of the product."""

from __future__ import annotations

from tests.fuzz.writer import Logits, Rows, Writer


def hidden(w: Writer, flat: bool) -> str:
    """[B, T, D] or [B*T, D] hidden states: a leaf, a computed value, or a frozen one."""
    x = w.floats("h", "B * T, D" if flat else "B, T, D", grad=0.85)
    kind = w.weighted(
        [(10, "leaf"), (3, "trunk"), (1, "scaled"), (1, "dropout"), (1, "detached"), (1, "normal"), (1, "half")]
    )
    if kind == "trunk":
        a = w.floats("a", "D, D", grad=0.7, scale=0.5)
        return w.let("h", f"torch.tanh({x} @ {a}) + {x}")
    if kind == "scaled":
        return w.let("h", f"{x} * 0.5")
    if kind == "dropout":
        return w.let("h", f"F.dropout({x}, 0.3, training=True)")
    if kind == "detached":
        return w.let("h", f"{x}.detach()")
    if kind == "normal":
        return w.let("h", f"F.normalize({x}, dim=-1)")
    if kind == "half":
        return w.let("h", f"{x}.to(torch.bfloat16)")
    return x


def weight(w: Writer) -> tuple[str, str]:
    """A weight as (expression [V, D], expression [D, V])."""
    kind = w.weighted(
        [(10, "leaf"), (3, "stored [D, V]"), (1, "scaled"), (1, "normal"), (1, "lora"), (1, "buffer"), (1, "strided")]
    )
    if kind == "stored [D, V]":
        name = w.floats("w", "D, V", grad=0.9, scale=0.6)
        return f"{name}.t()", name
    if kind == "strided":
        name = w.floats("w", "V, 2 * D", grad=0.9, scale=0.6)
        return f"{name}[:, ::2]", f"{name}[:, ::2].t()"
    name = w.floats("w", "V, D", grad=0.0 if kind == "buffer" else 0.9, scale=0.6)
    if kind == "scaled":
        name = w.let("w", f"{name} * 1.5")
    elif kind == "normal":
        name = w.let("w", f"F.normalize({name}, dim=-1) * 2")
    elif kind == "lora":
        a, b = w.floats("la", "V, 2", grad=0.9, scale=0.3), w.floats("lb", "2, D", grad=0.9, scale=0.3)
        name = w.let("w", f"{name} + {a} @ {b}")
    return name, w.pick([f"{name}.t()", f"{name}.T", f"{name}.transpose(0, 1)", f"torch.transpose({name}, -1, -2)"])


def bias(w: Writer) -> str:
    return w.floats("b", "V", grad=0.7)


def align(w: Writer, flat: bool) -> Rows:
    """Labels and mask, one a token."""
    shape, rank = ("B * T", 1) if flat else ("B, T", 2)
    ignored = f"torch.where(torch.rand({shape}) < 0.2, {w.ignore}, torch.randint(0, V, ({shape},)))"
    clean = f"torch.randint(0, V, ({shape},))"
    y = w.input("y", w.weighted([(8, ignored), (4, clean), (1, f"torch.full(({shape},), {w.ignore})")]))
    m = w.input("m", f"torch.rand({shape}).to(dtype)")
    return Rows(y, m, rank)


def several(w: Writer, h: str, flat: bool) -> Logits:
    """The logits of several heads in one tensor, numbered by its first or its last dimension of rows."""
    k, vocab, rank = w.pick([2, 3]), w.sizes["V"], 1 if flat else 2
    last = w.chance(0.6)
    tokens = "B * T" if flat else "B, T"
    shape = f"{tokens}, {k}" if last else f"{k}, {tokens}"
    ignored = f"torch.where(torch.rand({shape}) < 0.2, {w.ignore}, torch.randint(0, V, ({shape},)))"
    rows = Rows(w.input("y", ignored), w.input("m", f"torch.rand({shape}).to(dtype)"), rank + 1)
    weights = w.floats("w", f"{k}, V, D", grad=0.9, scale=0.6)
    cast = f"{weights}.to({h}.dtype)"
    biases = w.floats("b", f"{k}, V", grad=0.7) if w.chance(0.3) else ""
    bias = f", {biases}[i].to({h}.dtype)" if biases else ""
    at = rank if last else 0
    stacked = f"torch.stack([F.linear({h}, {cast}[i]{bias}) for i in range({k})], {at})"
    rest = "nd" if flat else "btd"
    out = rest[:-1] + "kv" if last else "k" + rest[:-1] + "v"
    viewed = f"F.linear({h}, {cast}.view(-1, {h}.shape[-1])).view(*{h}.shape[:-1], {k}, {vocab})"
    spelled = [(4, stacked), (2, f"torch.einsum('{rest},kvd->{out}', {h}, {cast})")]
    spelled += [(2, viewed)] if last else []
    return Logits(w.let("z", w.weighted(spelled)), rank + 2, rank + 1, vocab, rows)


def rows_of(w: Writer, rank: int, previous: Rows | None) -> Rows:
    return previous if previous is not None else align(w, rank == 2)


def project(w: Writer, h: str, flat: bool, rows: Rows) -> Logits:
    """One product of hidden states and a weight, in one of its spellings."""
    stored, transposed = weight(w)
    vocab, rank = w.sizes["V"], 2 if flat else 3
    if ".to(torch.bfloat16)" in str(w.stack[-1][-3:]):
        stored, transposed = f"({stored}).to({h}.dtype)", f"({transposed}).to({h}.dtype)"
    spelled: list[tuple[int, str]] = [
        (6, f"F.linear({h}, {stored})"),
        (3, f"{h} @ {transposed}"),
        (2, f"torch.matmul({h}, {transposed})"),
        (1, f"torch.einsum('...d,vd->...v', {h}, {stored})"),
        (1, f"F.linear({h}.float(), ({stored}).float())"),
        (1, f"({h} @ {transposed}).contiguous()"),
        (1, f"torch.inner({h}, {stored})"),
        (1, f"torch.tensordot({h}, {transposed}, 1)"),
    ]
    spelled += [
        (1, f"torch.cat([F.linear(x, {stored}) for x in {h}.split(2)])"),
        (1, f"torch.cat([F.linear({h}, x) for x in ({stored}).split(3)], -1)"),
        (1, f"torch.cat([x.float() * 0.5 for x in F.linear({h}, {stored}).chunk(2, -1)], -1)"),
        (1, f"torch.stack([F.linear(x, {stored}) for x in {h}])"),
    ]
    if flat:
        spelled += [(3, f"torch.mm({h}, {transposed})"), (1, f"{h}.mm({transposed})"), (1, f"({stored} @ {h}.t()).t()")]
        spelled += [(1, f"torch.einsum('nd,vd->nv', {h}, {stored})"), (1, f"torch.einsum('vd,nd->nv', {stored}, {h})")]
    else:
        spelled += [
            (1, f"torch.einsum('btd,vd->btv', {h}, {stored})"),
            (1, f"torch.bmm({h}, ({transposed}).expand({h}.shape[0], -1, -1))"),
        ]
        spelled += [
            (1, f"torch.einsum('btd,dv->btv', {h}, {transposed})"),
            (1, f"torch.einsum('btd,vd->bvt', {h}, {stored})"),
        ]
    if w.chance(0.3):
        b = bias(w)
        cast = f"{b}.to({h}.dtype)"
        spelled = [(4, f"F.linear({h}, {stored}, {cast})"), (1, f"F.linear({h}, {stored}, bias={cast})")]
        if flat:
            spelled += [
                (2, f"torch.addmm({cast}, {h}, {transposed})"),
                (1, f"torch.addmm({cast}, {h}, {transposed}, beta=0.5, alpha=2)"),
            ]
    expression = w.weighted(spelled)
    z = w.let("z", expression)
    class_dim = 1 if "->bvt" in expression else rank - 1
    return Logits(z, rank, class_dim, vocab, rows)

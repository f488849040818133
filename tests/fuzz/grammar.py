"""The grammar: how a whole program is put together. `draw(seed)` is a `Case`.

A program projects hidden states, moves and changes the logits, asks for one or more losses, reduces and adds them up,
and returns them, perhaps with something else that it made of the logits. Around parts of it there may be autocast,
checkpointing, grad-mode toggles and loops, and in-place writes where they hurt most.
"""

from __future__ import annotations

import random
from dataclasses import replace

from tests.fuzz.losses import TERMINALS, reduce, side
from tests.fuzz.program import Case
from tests.fuzz.projections import align, hidden, project, several
from tests.fuzz.transforms import MOVES, STEPS
from tests.fuzz.writer import Logits, Writer


def sizes(rng: random.Random) -> dict[str, int]:
    """Small, ragged, and now and then equal to one another."""
    b, t, d = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4, 5]), rng.choice([4, 6, 8])
    v = rng.choice([7, 11, 16, 33, 33, t + 3, d])
    return {"B": b, "T": t, "D": d, "V": max(v, 4)}


def change(w: Writer, z: Logits) -> Logits:
    """A few steps and moves in any order."""
    for _ in range(w.pick([0, 1, 1, 2, 2, 3, 4])):
        z = w.weighted(STEPS if w.chance(0.6) else MOVES)(w, z)
    return z


def interfere(w: Writer, h: str, z: Logits) -> None:
    """A write, between the product and the loss, to something the head reads."""
    y, m = z.rows.y, z.rows.m
    weights = [n for n in w.inputs if n.startswith("w")]
    choices = [f"{y}[{y} == {w.ignore}] = 0", f"{y}.clamp_(min=0)", f"{m}.mul_(0.5)", f"{m}[..., -1] = 0", f"{y} += 0"]
    choices += [f"{n}.detach().mul_(1.1)" for n in weights] + [f"{h}.detach().mul_(0.9)", f"{h}.detach()[..., 0] = 0"]
    w.line(w.pick(choices))


def head(w: Writer, h: str, flat: bool, rows: Logits | None) -> Logits:
    aligned = align(w, flat) if rows is None else rows.rows
    z = change(w, project(w, h, flat, aligned))
    if w.chance(0.12):
        interfere(w, h, z)
    if w.chance(0.03):
        w.line("torch._dynamo.graph_break()")
    return z


def loss(w: Writer, z: Logits) -> str:
    """One loss of these logits, reduced or not."""
    name, per_token = w.weighted(TERMINALS)(w, z)
    if per_token and w.chance(0.85):
        if w.chance(0.15):
            w.give(name)
        return reduce(w, name, z)
    return name


def chunked(w: Writer, z: Logits) -> str:
    """A loop over pieces of the rows."""
    total = w.let("total", "0.0")
    piece = w.pick([".split(2)", ".chunk(2)", ".unbind()", ""])
    one = z.rank - (piece in (".unbind()", "")) < 2
    if one or z.class_dim == 0:
        return loss(w, z)
    with w.block(f"for zc, yc in zip({z.name}{piece}, {z.rows.y}{piece}):"):
        last = "zc.movedim(1, -1)" if z.class_dim == 1 and z.rank == 3 and piece in (".split(2)", ".chunk(2)") else "zc"
        if z.class_dim != z.rank - 1 and last == "zc":
            last = "zc.movedim(0, -1)"
        ignore = f", ignore_index={w.ignore}, reduction='{w.pick(['mean', 'sum'])}'"
        weight = "" if w.chance(0.5) else "0.5 * "
        one_loss = f"F.cross_entropy({last}.reshape(-1, {z.vocab}), yc.reshape(-1){ignore})"
        w.line(f"{total} {w.pick(['+=', '='])} {weight}{one_loss}")
    return total


def chunked_heads(w: Writer, h: str, flat: bool) -> tuple[str, Logits]:
    """A loop over pieces of the tokens that calls the head for each."""
    rows = align(w, flat)
    weight = w.floats("w", "V, D", grad=0.9, scale=0.6)
    total = w.let("total", w.pick(["0.0", "torch.zeros([])"]))
    piece = w.pick([".split(2)", ".chunk(3)", "" if not flat else ".split(3)"])
    ignore = f"ignore_index={w.ignore}, reduction='{w.pick(['mean', 'sum'])}'"
    with w.block(f"for hc, yc in zip({h}{piece}, {rows.y}{piece}):"):
        z = w.pick(["{}", "3 * torch.tanh({} / 3)", "{}.float()"]).format(f"F.linear(hc, {weight}.to(hc.dtype))")
        one = f"F.cross_entropy(({z}).reshape(-1, {w.sizes['V']}), yc.reshape(-1), {ignore})"
        w.line(w.pick([f"{total} += {one}", f"{total} = {total} + {one}", f"{total} -= 0.5 * {one}"]))
    z = w.let("z", f"F.linear({h}, {weight}.to({h}.dtype))")
    return total, Logits(z, rows.rank + 1, rows.rank, w.sizes["V"], rows)


def in_a_region(w: Writer, h: str, flat: bool) -> tuple[str, Logits]:
    """Head and loss, or one of them, in a region that is compiled once and called twice."""
    inner = w.fresh("body")
    rows = align(w, flat)
    kind = w.pick(["both", "head", "loss"])
    once = f"{inner} = torch.compiler.nested_compile_region({inner})"
    if kind == "loss":
        z = project(w, h, flat, rows)
        with w.block(f"def {inner}(z):"):
            w.line(f"return {loss(w, replace(z, name='z'))}")
        w.line(once)
        result = w.let("l", f"{inner}({z.name}).sum() + {inner}({z.name} * 0.5).sum()")
        return result, z
    with w.block(f"def {inner}(h):"):
        z = change(w, project(w, "h", flat, rows)) if kind == "both" else project(w, "h", flat, rows)
        w.line(f"return {loss(w, z) if kind == 'both' else z.name}")
    w.returns.clear()  # what was given inside is not visible out here
    w.line(once)
    if kind == "both":
        return w.let("l", f"{inner}({h}).sum() + {inner}({h} * 0.5).sum()"), z
    first, second = (replace(z, name=w.let("z", f"{inner}({x})")) for x in (h, f"{h} * 0.5"))
    return w.let("l", f"{loss(w, first)}.sum() + {loss(w, second)}.sum()"), first


def whole_loss(w: Writer, h: str, flat: bool, previous: Logits | None) -> tuple[str, Logits]:
    if previous is None and w.chance(0.04):
        return chunked_heads(w, h, flat)
    if previous is None and w.chance(0.08):
        z = change(w, several(w, h, flat))
    else:
        z = head(w, h, flat, previous)
    if w.chance(0.06):
        return chunked(w, z), z
    result = loss(w, z)
    if w.chance(0.2):
        second = loss(w, change(w, z) if w.chance(0.3) else z)
        result = w.let("l", f"{result} + {w.pick(['0.1', '1.0', '0.0'])} * {second}")
    return result, z


def checkpointed(w: Writer, h: str, flat: bool) -> tuple[str, Logits]:
    """Head and loss inside ``torch.utils.checkpoint``."""
    inner = w.fresh("body")
    aligned = align(w, flat)
    with w.block(f"def {inner}(h):"):
        z = change(w, project(w, "h", flat, aligned))
        result = loss(w, z)
        w.line(f"return {w.pick([result, result, f'{result}, {z.name}'])}")
    returned = str(w.stack[-1][-1].body[-1])  # type: ignore[union-attr]
    w.returns = [r for r in w.returns if r.startswith("outer")]  # what was given inside is not visible out here
    if "," in returned:
        out = w.fresh("l")
        w.line(f"{out}, z_out = checkpoint({inner}, {h}, use_reentrant=False)")
        w.give("z_out")
        return out, z
    return w.let("l", f"checkpoint({inner}, {h}, use_reentrant=False)"), z


def draw(seed: str | int) -> Case:
    """The program of a seed."""
    rng = random.Random(seed)
    w = Writer(
        rng,
        sizes(rng),
        rng.choice(["float32", "float32", "float32", "bfloat16"]),
        rng.choice([-100, -100, -100, -1, 0]),
    )
    flat = w.chance(0.3)
    h = hidden(w, flat)
    if w.chance(0.08):
        result, z = checkpointed(w, h, flat)
    elif w.chance(0.04):
        result, z = in_a_region(w, h, flat)
    else:
        with w.maybe(0.06, 'with torch.autocast("cpu", torch.bfloat16):'):
            result, z = whole_loss(w, h, flat, None)
            if w.chance(0.12):
                other, _ = whole_loss(w, h, flat, None)
                result = w.let("l", f"{result} + {other}")
            for _ in range(w.pick([0, 0, 0, 1, 1, 2])):
                side(w, z)
        if w.chance(0.05):
            w.line(f"{h}.detach().add_(0.1)")
    if w.chance(0.1):
        result = w.let("l", f"{result} + 0.01 * {h}.float().pow(2).mean()")
    elif w.chance(0.05):
        w.line(f"{result} += 0.5")
    w.returns.insert(0 if w.chance(0.8) else len(w.returns), result)
    return w.case(
        dynamic=w.chance(0.15),
        ambient_autocast=w.chance(0.08),
        no_grad=w.chance(0.06),
        logits=w.pick(["eager", "deferred"]),
    )

"""What a program asks of its logits: losses, log-probabilities, regularisers, side consumers.

`terminal` returns the name of a scalar or of a tensor with one entry a token, and whether it is the latter.
"""

from __future__ import annotations

from tests.fuzz.transforms import flatten
from tests.fuzz.writer import Logits, Writer


def for_cross_entropy(w: Writer, z: Logits) -> Logits:
    """Logits with their classes where `F.cross_entropy` takes them."""
    if z.class_dim == 1 or w.chance(0.03):
        return z
    if z.rank == 3 and z.class_dim == 2:
        return flatten(w, z)
    name = w.let("z", f"{z.name}.movedim({z.class_dim}, 1)" if z.rank > 2 else z.name)
    return Logits(name, z.rank, 1, z.vocab, z.rows)


def class_weights(w: Writer, z: Logits, grad: float = 0.0) -> str:
    return w.input("cw", f"torch.rand({z.vocab}).to(dtype)" + (".requires_grad_()" if w.chance(grad) else ""))


def valid_labels(w: Writer, z: Logits) -> str:
    if w.chance(0.05):
        return z.rows.y  # labels that are to be ignored are out of range
    return w.let("y", f"{z.rows.y}.clamp(0, {z.vocab - 1})")


def cross_entropy(w: Writer, z: Logits) -> tuple[str, bool]:
    z = for_cross_entropy(w, z)
    reduction = w.weighted([(5, "mean"), (3, "sum"), (4, "none")])
    arguments = [z.name, z.rows.y]
    if w.chance(0.05):
        arguments[1] += ".to(torch.uint8)"
    options = [] if reduction == "mean" and w.chance(0.7) else [f"reduction='{reduction}'"]
    options += [] if (w.ignore == -100 and w.chance(0.7)) or w.chance(0.03) else [f"ignore_index={w.ignore}"]
    options += [f"label_smoothing={w.pick([0.1, 0.3, 1.0])}"] if w.chance(0.25) else []
    weight = class_weights(w, z, 0.1) if w.chance(0.2) else None
    options += [f"weight={weight}.to({z.name}.dtype)"] if weight else []
    w.rng.shuffle(options)
    call = f"F.cross_entropy({', '.join([*arguments, *options])})"
    if w.chance(0.1):
        result = "".join(f", {o}" for o in options)
        call = f"torch.nn.CrossEntropyLoss({result.removeprefix(', ')})({', '.join(arguments)})"
    return w.let("l", call), reduction == "none"


def log_softmax(w: Writer, z: Logits) -> str:
    dim = z.class_dim if w.chance(0.5) else z.class_dim - z.rank
    if w.chance(0.04):
        dim = 0
    return w.weighted(
        [(4, f"F.log_softmax({z.name}, {dim})"), (3, f"{z.name}.log_softmax({dim})"),
         (1, f"torch.log_softmax({z.name}, dim={dim})"),
         (1, f"F.log_softmax({z.name}, dim={dim}, dtype=torch.float32)"),
         (1, f"{z.name} - torch.logsumexp({z.name}, {dim}, keepdim=True)"),
         (1, f"torch.log(torch.softmax({z.name}, {dim}) + 1e-9)")]
    )  # fmt: skip


def nll(w: Writer, z: Logits) -> tuple[str, bool]:
    z = for_cross_entropy(w, z)
    reduction = w.weighted([(5, "mean"), (3, "sum"), (4, "none")])
    lp = w.let("lp", log_softmax(w, z))
    lp = w.pick([lp, lp, lp, f"{lp} * 0.5", f"{lp} / 2", f"{lp}.float()"])
    ignore = "" if w.ignore == -100 else f", ignore_index={w.ignore}"
    return w.let("l", f"F.nll_loss({lp}, {z.rows.y}, reduction='{reduction}'{ignore})"), reduction == "none"


def gathered(w: Writer, z: Logits) -> tuple[str, bool]:
    """Log-probabilities of the labels, by gather."""
    d, y = z.class_dim, valid_labels(w, z)
    lp = w.let("lp", log_softmax(w, z))
    lp = w.pick([lp, lp, f"(-{lp})", f"({lp} * 2)"])
    index = f"{y}.unsqueeze({d})"
    twice = ", ".join("2" if k == d else "-1" for k in range(z.rank))
    picked = w.weighted(
        [(5, f"{lp}.gather({d}, {index}).squeeze({d})"), (2, f"torch.gather({lp}, {d}, {index}).squeeze({d})"),
         (1, f"torch.take_along_dim({lp}, {index}, dim={d}).squeeze({d})"), (1, f"{lp}.gather({d}, {index}).sum({d})"),
         (1, f"{lp}.gather({d}, {index}.expand({twice})).mean({d})")]
    )  # fmt: skip
    return w.let("l", f"-({picked})"), True


def gather_minus_lse(w: Writer, z: Logits) -> tuple[str, bool]:
    d, y = z.class_dim, valid_labels(w, z)
    lse = w.let(
        "lse",
        w.pick(
            [
                f"torch.logsumexp({z.name}, {d})",
                f"{z.name}.logsumexp({d - z.rank})",
                f"{z.name}.logsumexp(dim={d}, keepdim=True).squeeze({d})",
            ]
        ),
    )
    picked = w.let("zy", f"{z.name}.gather({d}, {y}.unsqueeze({d})).squeeze({d})")
    return w.let("l", f"{lse} - {picked}"), True


def z_loss(w: Writer, z: Logits) -> tuple[str, bool]:
    lse = w.let("lse", f"{z.name}.logsumexp({z.class_dim})")
    if w.chance(0.5):
        lse = w.let(
            "lse",
            w.pick(
                [
                    f"{lse} * {z.rows.m}",
                    f"{lse}.reshape(-1).view({lse}.shape)",
                    f"torch.where({z.rows.m} > 0.5, {lse}, 0.0)",
                ]
            ),
        )
    return w.let(
        "l",
        w.pick([f"0.1 * {lse} ** 2", f"{lse}.pow(2)", f"{lse} * {lse} * 0.1", f"{lse}.square()", lse, f"{lse}.abs()"]),
    ), True


def smooth(w: Writer, z: Logits) -> tuple[str, bool]:
    """Label smoothing by hand."""
    d, y = z.class_dim, valid_labels(w, z)
    lp = w.let("lp", log_softmax(w, z))
    picked = w.let("nll", f"-{lp}.gather({d}, {y}.unsqueeze({d})).squeeze({d})")
    rest = w.let(
        "u", w.pick([f"-{lp}.sum({d})", f"-{lp}.mean({d})", f"-{lp}.mean(dim={d}, keepdim=True).squeeze({d})"])
    )
    return w.let("l", f"0.9 * {picked} + 0.1 * {rest}"), True


def probabilities(w: Writer, z: Logits) -> tuple[str, bool]:
    """Functions of the whole distribution: entropy, soft targets, KL, Σp², top-k, the largest."""
    n, d = z.name, z.class_dim
    lp = w.let("lp", log_softmax(w, z))
    forms = [f"-({lp}.exp() * {lp}).sum({d})", f"-(F.softmax({n}, {d}) * {lp}).sum({d})",
             f"(F.softmax({n}, {d}) ** 2).sum({d})",
             f"{n}.logsumexp({d}) - (F.softmax({n}, {d}) * {n}).sum({d})", f"{lp}.topk(2, {d}).values.sum({d})",
             f"{lp}.amax({d})", f"{lp}.max({d}).values", f"-{lp}.mean({d})",
             f"-(torch.full_like({lp}, {1 / z.vocab}) * {lp}).sum({d})",
             f"F.kl_div({lp}, torch.full_like({lp}, {1 / z.vocab}), reduction='none').sum({d})"]  # fmt: skip
    return w.let("l", w.pick(forms)), True


def soft_targets(w: Writer, z: Logits) -> tuple[str, bool]:
    """Losses against a distribution: cross entropy of probabilities, KL both ways, JSD, a margin, a mixture."""
    n, d = z.name, z.class_dim
    shape = ", ".join("-1" if k == d else "1" for k in range(z.rank))
    t = w.let("t", f"torch.softmax({z.rows.m}.unsqueeze({d}) * torch.linspace(-2, 2, {z.vocab}).view({shape}), {d})")
    hot = f"F.one_hot({valid_labels(w, z)}, {z.vocab}).movedim(-1, {d})"
    kl = "F.kl_div(F.log_softmax({}, {}), {}, reduction='{}')"
    forms: list[tuple[int, str, bool]] = [
        (2, f"-({t} * F.log_softmax({n}, {d})).sum({d})", True),
        (2, kl.format(n, d, t, "batchmean"), False),
        (1, kl.format(n, d, t, "none") + f".sum({d})", True),
        (1, f"(F.softmax({n}, {d}) * (F.log_softmax({n}, {d}) - {t}.log())).sum({d})", True),
        (1, f"({hot} * F.log_softmax({n} - 0.3 * {hot}, {d})).sum({d})", True),
        (1, f"-torch.log(0.5 * F.softmax({n}, {d}) + 0.5 * F.softmax({n} * 0.5, {d})).amax({d})", True),
        (1, f"(F.softmax({n}, {d}) - {t}).pow(2).sum({d})", True),
        (1, f"(torch.sigmoid({n}) * {t}).sum({d})", True),
    ]
    if d == 1:
        forms.append((2, f"F.cross_entropy({n}, {t}.to({n}.dtype))", False))
        forms.append((1, f"F.cross_entropy({n}, {t}.to({n}.dtype), label_smoothing=0.1, reduction='none')", True))
    _, form, per_token = w.weighted([(weight, (weight, f, p)) for weight, f, p in forms])
    return w.let("l", form), per_token


def wrong_dimension(w: Writer, z: Logits) -> tuple[str, bool]:
    """Losses over a dimension that is not the vocabulary."""
    d = (z.class_dim + 1) % z.rank
    return w.let(
        "l",
        w.pick(
            [
                f"-F.log_softmax({z.name}, {d}).mean()",
                f"torch.logsumexp({z.name}, {d}).sum()",
                f"F.log_softmax({z.name}.reshape(-1), 0).std()",
            ]
        ),
    ), False


TERMINALS = [
    (10, cross_entropy), (3, nll), (4, gathered), (3, gather_minus_lse), (2, z_loss), (2, smooth), (2, probabilities),
    (2, soft_targets), (1, wrong_dimension),
]  # fmt: skip


def reduce(w: Writer, x: str, z: Logits) -> str:
    """A scalar (or a differently shaped result) out of one entry a token."""
    m = f"{z.rows.m}.reshape({x}.shape)"
    if w.chance(0.2):
        kinds = [
            f"{x} *= {m}",
            f"{x}[:1] = 0.0",
            f"{x}.mul_(0.5)",
            f"{x} += 1",
            f"{x}[{m} < 0.5] = 0.0",
            f"{z.rows.m}.mul_(0.5)",
        ]
        w.line(
            w.pick(
                [
                    *kinds,
                    f"{x}[..., -1:] = {x}[..., -1:].detach()",
                    f"{x}.detach().mul_(0.5)",
                    f"{x}.data.clamp_(max=1)",
                ]
            )
        )
    forms = [
        (4, f"{x}.sum()"), (4, f"{x}.mean()"), (4, f"({x} * {m}).sum() / {m}.sum()"),
        (2, f"({x} * {m}).sum() / {m}.sum().clamp(min=1)"),
        (1, f"{x}.sum() / 7"), (1, f"{x}.reshape(-1)[:2].sum()"), (2, f"torch.where({m} > 0.5, {x}, 0.0).sum()"),
        (1, f"{x}.masked_fill({m} < 0.3, 0.0).mean()"), (1, f"{x}.pow(2).mean()"), (1, f"(-{x}).exp().mean()"),
        (1, f"({x} * (-{x}).exp().detach()).sum()"), (1, f"-F.logsigmoid({x}.sum())"), (1, f"{x}.sum(-1)"), (2, x),
        (1, f"{x}.max()"), (1, f"torch.minimum({x} * 0.9, {x} * 1.1).mean()"),
        (1, f"({x} - {x}.detach()).exp().mean()"),
        (1, f"{x}.reshape(-1).cumsum(0).mean()"), (1, f"({x} * {x}).sum()"), (1, f"{x}.double().sum().float()"),
        (1, f"F.smooth_l1_loss({x}, {m})"), (1, f"{x}.var() if {x}.numel() > 1 else {x}.sum()"),
    ]  # fmt: skip
    return w.let("l", w.weighted(forms))


def side(w: Writer, z: Logits) -> None:
    """Something else that reads the logits."""
    n, d = z.name, z.class_dim
    kind = w.weighted(
        [
            (6, "returned"),
            (3, "argmax"),
            (2, "no_grad"),
            (1, "keep alive"),
            (1, "detached"),
            (1, "isinf"),
            (1, "slice"),
            (1, "double"),
        ]
    )
    if kind == "returned":
        w.give(
            w.let("r", w.pick([n, n, n, f"{n}.float()", f"{n}[:1]", f"{n}.detach()", f"{n} * 2", f"{n}.unsqueeze(0)"]))
        )
    elif kind == "argmax":
        hit = w.pick(
            [
                f"{n}.argmax({d})",
                f"{n}.detach().argmax({d})",
                f"({n}.argmax({d}) == {z.rows.y}).float()",
                f"{n}.max({d}).indices",
                f"{n}.max({d})[1]",
                f"{n}.argsort({d})",
                f"{n}.topk(2, {d}).indices",
            ]
        )
        w.give(w.let("hit", hit), decision=True)
    elif kind == "no_grad":
        name = w.fresh("e")
        with w.block("with torch.no_grad():"):
            w.line(
                f"{name} = "
                + w.pick(
                    [
                        f"{n}.argmax({d})",
                        f"{n}.logsumexp({d})",
                        f"-(F.softmax({n}, {d}) * F.log_softmax({n}, {d})).sum({d})",
                        f"{n}.mean()",
                        f"{n}.mul(2).log_softmax({d}).sum({d})",
                    ]
                )
            )
        w.give(name, decision=True)
    elif kind == "keep alive":
        w.give(w.let("k", w.pick([f"{n}.sum() * 0", f"{n}.mean() * 0", f"{n}.sum()"])))
    elif kind == "detached":
        w.give(w.let("k", w.pick([f"{n}.detach().mean()", f"{n}.detach().logsumexp({d})", f"{n}.data.max()"])))
    elif kind == "isinf":
        w.give(w.let("k", f"torch.isinf({n}).any()"))
    elif kind == "slice":
        w.give(w.let("k", f"{n}.select({d}, 0)"))
    else:
        w.give(w.let("k", f"{n}.double().logsumexp({d})"))

"""What is asked of an arrangement that ran on ranks: the numbers of one process, a fused head, so many collectives."""

from __future__ import annotations

from typing import Any

import torch

from tests.parallel.arrangements import ARRANGEMENTS, reference
from tests.parallel.models import Setting

NO_CLASS = "one of the 4 ranks holds none of the 9 classes"  # where V is 9


def errors(name: str, setting: Setting, ours: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, our error, the error allowed) of every tensor: 1.5 times torch's own in the same dtype, or a few units.

    Torch's own is that of one process in eager mode; of a program that went through Inductor also Inductor's, which
    rounds at other places.
    """
    of = ARRANGEMENTS[name].of
    exact, theirs = reference(setting, of, torch.float64), [reference(setting, of, setting.dtype)]
    if setting.inductor:
        theirs.append(reference(setting, of, setting.dtype, inductor=True))
    parts = [("losses", lambda results: results["losses"])]
    for part in ("gradients", "parameters"):
        assert ours[part].keys() == exact[part].keys()
        parts += [(f"{part} {k}", lambda results, part=part, k=k: results[part][k]) for k in exact[part]]
    results = []
    for what, of_result in parts:
        truth = of_result(exact)
        least = 4 * torch.finfo(torch.float32).eps * float(truth.abs().max())
        error, *bounds = (float((of_result(each) - truth).abs().max()) for each in (ours, *theirs))
        results.append((what, error, max(1.5 * max(bounds), least)))
    return results


def errors_of_rounding(name: str, settings: list[Setting], ours: list[Any]) -> list[tuple[str, float, float]]:
    """(what, our error, the error allowed) in two bytes: root mean squares over several seeds, 1.5 times torch's own.

    The largest error of a few sums that are rounded to eight bits is luck: that of a single head on one process is up
    to 2.4 times eager's for one seed, and a part of it for another.
    """
    squares: dict[str, list[float]] = {}
    for setting, result in zip(settings, ours, strict=True):
        assert isinstance(result, dict), result
        of = ARRANGEMENTS[name].of
        exact, theirs = (reference(setting, of, dtype) for dtype in (torch.float64, setting.dtype))
        for part in ("gradients", "parameters"):
            assert result[part].keys() == exact[part].keys()
            for key, truth in exact[part].items():
                error, plain = (float((each[part][key] - truth).square().sum()) for each in (result, theirs))
                squares.setdefault(f"{part} {key}", []).extend((error, plain))
    return [(what, sum(each[::2]) ** 0.5, 1.5 * sum(each[1::2]) ** 0.5) for what, each in squares.items()]


def check(name: str, setting: Setting, ours: Any) -> None:
    """Raise AssertionError where a rank's outcome of an arrangement is not what it must be."""
    assert isinstance(ours, dict), ours
    for what, error, allowed in errors(name, setting, ours):
        assert error <= allowed, (what, error, allowed)
    arrangement, of = ARRANGEMENTS[name], ARRANGEMENTS[name].of
    tokens = setting.batch * setting.time * of.rows // of.micro
    sizes = [arrangement.of.vocab, dict(arrangement.of.model).get("second")]
    assert len(ours["heads"]) == len([size for size in sizes if size])
    for (fused, reason, vocab, count), size in zip(ours["heads"], sizes):
        assert fused == (not arrangement.left), reason
        assert reason.startswith(arrangement.left)
        assert (vocab, count) == (size * setting.scale, tokens)
    for engine in () if arrangement.left else ours["engines"]:
        again = arrangement.again or (NO_CLASS if NO_CLASS in engine else "")
        assert (again if again else "gradients in the forward sweep") in engine, engine
    if arrangement.forward is not None and setting.count:
        assert (ours["forward"], ours["backward"]) == (arrangement.forward, arrangement.backward)

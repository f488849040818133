"""What is asked of an arrangement that ran on ranks: the numbers of one process, a fused head, so many collectives."""

from __future__ import annotations

from typing import Any

import torch

from tests.parallel.arrangements import ARRANGEMENTS, reference
from tests.parallel.models import Setting


def errors(name: str, setting: Setting, ours: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, our error, the error allowed) of every tensor: 1.5 times eager's own in the same dtype, or a few units."""
    of = ARRANGEMENTS[name].of
    eager, exact = (reference(setting, of, dtype) for dtype in (setting.dtype, torch.float64))
    pairs = [("losses", ours["losses"], eager["losses"], exact["losses"])]
    for part in ("gradients", "parameters"):
        assert ours[part].keys() == eager[part].keys()
        pairs += [(f"{part} {k}", ours[part][k], eager[part][k], exact[part][k]) for k in exact[part]]
    found = []
    for what, got, plain, truth in pairs:
        least = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        allowed = max(1.5 * (plain - truth).abs().max(), least)
        found.append((what, float((got - truth).abs().max()), float(allowed)))
    return found


def check(name: str, setting: Setting, ours: Any) -> None:
    """Raise AssertionError where a rank's outcome of an arrangement is not what it must be."""
    assert isinstance(ours, dict), ours
    for what, error, allowed in errors(name, setting, ours):
        assert error <= allowed, (what, error, allowed)
    arrangement, tokens = ARRANGEMENTS[name], setting.batch * setting.time // ARRANGEMENTS[name].of.micro
    sizes = [arrangement.of.vocab, dict(arrangement.of.model).get("second")]
    assert len(ours["heads"]) == len([size for size in sizes if size])
    for (fused, reason, vocab, count), size in zip(ours["heads"], sizes):
        assert fused == (not arrangement.left), reason
        assert reason.startswith(arrangement.left)
        assert (vocab, count) == (size * setting.scale, tokens)
    if arrangement.forward is not None and setting.count:
        assert (ours["forward"], ours["backward"]) == (arrangement.forward, arrangement.backward)

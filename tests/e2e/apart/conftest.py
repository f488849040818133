"""torchvision beside a torch that it was not built for, enough of it for timm and torchtune to be imported.

Its wheel is built for one torch, with CUDA. Beside another the library of its operators may not load, and importing its
Python part then fails because two of them are unknown. Nothing here calls them, so their schemas are declared; where
the library loads it declares them itself, and a second declaration would end the process.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

SCHEMAS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
           "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # fmt: skip


def operators_load() -> bool:
    """Whether torchvision's library of operators works beside this torch; it is loaded then."""
    result = find_spec("torchvision")
    libraries = Path(result.origin).parent.glob("_C*.so") if result and result.origin else ()
    for library in libraries:  # one; its name has changed
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return True
    return False


if not operators_load():
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        declared.define(schema)

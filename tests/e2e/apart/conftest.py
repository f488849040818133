"""torchvision beside a CPU build of torch, enough of it for timm and torchtune to be imported.

Its wheel is built for a torch with CUDA. Elsewhere the library of its operators cannot be loaded, and importing its
Python part then fails because two of them are unknown. Nothing here calls them, so their schemas are declared.
"""

from __future__ import annotations

import torch

SCHEMAS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
           "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # fmt: skip

if not torch.cuda.is_available():
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        declared.define(schema)

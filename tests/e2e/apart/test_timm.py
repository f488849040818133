"""timm: a vision transformer with a head of 21 841 classes and label smoothing, compiled, loss outside."""

from __future__ import annotations

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy

from tests.e2e.comparison import Trained, check, weights

CLASSES = 21_841


def test_a_classifier_of_imagenet_21k() -> None:
    def program(compiled: bool) -> Trained:
        model = timm.create_model(
            "vit_tiny_patch16_224",
            num_classes=CLASSES,
            img_size=32,
            patch_size=8,
            depth=1,
            embed_dim=64,
            num_heads=2,
        )
        criterion = LabelSmoothingCrossEntropy(0.1)
        run = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        images = torch.randn(3, 16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        labels = torch.arange(48).view(3, 16) * 451 % CLASSES
        before, logged = weights(model), {}
        for step in range(3):
            loss = criterion(run(images[step]), labels[step])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logged[f"loss {step}"] = float(loss)
        return Trained(logged, before, weights(model))

    check(program, heads=1)

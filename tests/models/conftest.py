from __future__ import annotations

import pytest
import torch
from torch import nn

from flexifed.models import build_model, input_kind

SHORT = 130  # characters, enough for CharCNN-6


class SmallModels:
    """Thin models, and inputs that fit them."""

    def build(self, name: str, seed: int = 0, num_classes: int = 4, width: float = 0.1) -> nn.Module:
        options = {"length": SHORT} if input_kind(name) == "text" else {}
        generator = torch.Generator().manual_seed(seed)
        return build_model(name, num_classes=num_classes, width=width, generator=generator, **options)

    def inputs(self, name: str, count: int = 2) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        if input_kind(name) == "text":
            return torch.randint(0, 70, (count, SHORT), generator=generator)
        return torch.randn(count, 3, 32, 32, generator=generator)


@pytest.fixture
def small() -> SmallModels:
    return SmallModels()

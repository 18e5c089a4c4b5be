from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

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

    def overfit(self, name: str, *, width: float, steps: int, learning_rate: float = 0.01) -> float:
        """Mean loss of the last five steps of training on one batch of eight samples of four classes."""
        model, inputs = self.build(name, width=width).train(), self.inputs(name, 8)
        labels = torch.arange(8) % 4
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
        losses = []
        with torch.random.fork_rng():
            torch.manual_seed(0)  # dropout
            for _ in range(steps):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return sum(losses[-5:]) / 5


@pytest.fixture
def small() -> SmallModels:
    return SmallModels()

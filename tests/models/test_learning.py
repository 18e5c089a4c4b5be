"""Every model can learn: a thin one memorises a batch within a few steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from flexifed.models import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_one_batch_can_be_memorised(small, name: str) -> None:
    """Eight samples of four classes, without dropout, so that only a model that can't learn fails."""
    width, steps, learning_rate = (0.25, 40, 0.003) if name.startswith("resnet") else (0.1, 100, 0.001)
    model, inputs, labels = small.build(name, width=width).train(), small.inputs(name, 8), torch.arange(8) % 4
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.1 * math.log(4)

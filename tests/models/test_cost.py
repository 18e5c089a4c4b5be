from __future__ import annotations

import pytest
import torch
from torch import nn

from flexifed.models import build_model
from flexifed.models.cost import multiply_adds

IMAGE = torch.empty(1, 3, 32, 32, device="meta")


@pytest.mark.parametrize(("name", "millions"), [("resnet20", 40.6), ("resnet56", 125.5)])
def test_resnets_cost_what_is_published(name: str, millions: float) -> None:
    model = build_model(name, num_classes=10, device="meta")
    assert round(multiply_adds(model, IMAGE) / 1e6, 1) == millions


def test_vgg16s_convolutions_cost_what_is_published() -> None:
    model = build_model("vgg16", num_classes=10, device="meta")
    convolutions = multiply_adds(model.features, IMAGE)
    assert round(convolutions / 1e6) == 313
    assert multiply_adds(model, IMAGE) == convolutions + 512 * 4096 + 4096 * 4096 + 4096 * 10


def test_charcnn6_costs_the_sum_over_its_frames() -> None:
    text = torch.empty(1, 1014, dtype=torch.int64, device="meta")
    convolutions = 256 * (1008 * 7 * 70 + 256 * (330 * 7 + (108 + 106 + 104 + 102) * 3))
    classifier = 34 * 256 * 1024 + 1024 * 1024 + 1024 * 4
    assert multiply_adds(build_model("charcnn6", num_classes=4, device="meta"), text) == convolutions + classifier


@pytest.mark.parametrize("count", [1, 3])
def test_cost_is_that_of_one_sample_and_of_a_models_groups(count: int) -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(6 * 8, 5))
    assert multiply_adds(model, torch.zeros(count, 4, 10)) == 8 * 6 * 3 * 2 + 48 * 5


def test_counting_leaves_the_model_as_it_is() -> None:
    model = build_model("vgg11_bn", num_classes=10, width=0.05).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    multiply_adds(model, torch.zeros(2, 3, 32, 32))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flexifed.core.signature import signature
from flexifed.models import build_model
from flexifed.models.base import PaddedShortcut
from flexifed.models.resnet import BLOCKS

# He et al. 2016, table 6, in millions.
PUBLISHED = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_full_width_models_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    model = build_model(name, num_classes=10, device="meta")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(("depth", "blocks"), BLOCKS.items())
def test_the_name_says_the_number_of_layers_and_they_halve_the_image_twice(depth: int, blocks: int) -> None:
    model = build_model(f"resnet{depth}", num_classes=10, device="meta")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) + 1 == len(signature(model).layers) == depth
    assert [module.out_channels for module in convolutions] == [16] * (2 * blocks + 1) + [
        *[32] * 2 * blocks,
        *[64] * 2 * blocks,
    ]
    strides = [index for index, module in enumerate(convolutions) if module.stride == (2, 2)]
    assert strides == [2 * blocks + 1, 4 * blocks + 1]
    assert not any(module.bias is not None for module in convolutions)


def test_padded_shortcut_keeps_every_second_pixel_and_adds_channels_of_zeros() -> None:
    images = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    wider = PaddedShortcut(added_channels=2, stride=2)(images)
    assert wider.shape == (2, 5, 2, 2)
    assert torch.equal(wider[:, :3], images[:, :, ::2, ::2])
    assert not wider[:, 3:].any()


@pytest.mark.parametrize("index", [0, 3, 6])
def test_a_block_whose_convolutions_return_zeros_is_its_shortcut(small, index: int) -> None:
    block = small.build("resnet20", width=0.5).blocks[index].eval()
    nn.init.zeros_(block.norm2.weight)
    images = torch.rand(2, block.conv1.in_channels, 8, 8)  # not negative: the last ReLU changes nothing
    assert torch.equal(block(images), block.shortcut(images))


def test_how_a_shortcut_joins_is_part_of_the_layer_above_it() -> None:
    plain, changed = (build_model("resnet20", num_classes=10, width=0.1, device="meta") for _ in range(2))
    changed.blocks[0].shortcut = PaddedShortcut(added_channels=0)
    pairs = zip(signature(plain).layers, signature(changed).layers, strict=True)
    same = [plain_layer == changed_layer for plain_layer, changed_layer in pairs]
    assert same[:4] == [True, True, True, False]
    assert all(same[4:])


def test_initial_weights_have_vggs_distributions(small) -> None:
    for module in small.build("resnet20", width=1.0).modules():
        if isinstance(module, nn.Conv2d):
            sigma = math.sqrt(2 / (9 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(sigma, rel=5 / math.sqrt(2 * module.weight.numel()))
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not torch.cat([module.bias, module.running_mean]).any()
        elif isinstance(module, nn.Linear):
            assert max(module.weight.abs().max().item(), module.bias.abs().max().item()) <= 1 / 8


@pytest.mark.parametrize(("in_channels", "num_classes", "size"), [(3, 10, 32), (1, 30, 32), (1, 30, 40)])
def test_output_has_one_score_for_each_class(in_channels: int, num_classes: int, size: int) -> None:
    model = build_model("resnet20", num_classes=num_classes, in_channels=in_channels, width=0.2)
    assert model(torch.zeros(2, in_channels, size, size)).shape == (2, num_classes)

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flexifed.core.signature import signature
from flexifed.models import build_model
from flexifed.models.vdcnn import CONVOLUTIONS, MIN_LENGTH, KMaxPool

# Conneau et al. 2017, table 2: millions of parameters, convolutions in the blocks of 64, 128, 256 and 512 channels.
PUBLISHED = {9: (2.2, (2, 2, 2, 2)), 17: (4.3, (4, 4, 4, 4)), 29: (4.6, (10, 10, 4, 4)), 49: (7.8, (16, 16, 10, 6))}


def num_parameters(depth: int, part: str = "") -> int:
    model = build_model(f"vdcnn{depth}", num_classes=4, device="meta")
    return sum(tensor.numel() for name, tensor in model.named_parameters() if name.startswith(part))


@pytest.mark.parametrize("depth", PUBLISHED)
def test_layers_are_those_of_the_papers_table(depth: int) -> None:
    model = build_model(f"vdcnn{depth}", num_classes=4, device="meta")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv1d)]
    assert len(convolutions) == depth == 1 + sum(CONVOLUTIONS[depth])
    stages = [64] + [
        channels for channels, count in zip((64, 128, 256, 512), PUBLISHED[depth][1], strict=True) for _ in range(count)
    ]
    assert [module.out_channels for module in convolutions] == stages
    pools = [index for index, block in enumerate(model.blocks) if isinstance(block.pool, nn.MaxPool1d)]
    first, second, third, _ = (count // 2 for count in PUBLISHED[depth][1])
    assert pools == [first, first + second, first + second + third]
    assert len(signature(model).layers) == 1 + depth + 3


@pytest.mark.parametrize("depth", PUBLISHED)
def test_full_width_models_have_as_many_parameters_as_the_published_shapes(depth: int) -> None:
    expected, below = 70 * 16 + (3 * 16 * 64 + 64), 64
    for channels, count in zip((64, 128, 256, 512), PUBLISHED[depth][1], strict=True):
        for _ in range(count):
            expected += 3 * below * channels + channels + 2 * channels
            below = channels
    classifier = (4096 * 2048 + 2048) + (2048 * 2048 + 2048) + (2048 * 4 + 4)
    assert num_parameters(depth) == expected + classifier
    assert num_parameters(depth, "classifier") == classifier


def test_depths_differ_by_as_many_parameters_as_the_published_ones() -> None:
    # The published totals are 0.6 million above the layers that the paper describes (its classifier alone has 12.6).
    gaps = [
        millions - (num_parameters(depth) - num_parameters(depth, "classifier")) / 1e6
        for depth, (millions, _) in PUBLISHED.items()
    ]
    assert gaps == pytest.approx([0.6] * 4, abs=0.06)


def test_k_max_pooling_keeps_the_largest_values_in_their_order() -> None:
    values = torch.tensor([[[1.0, 9, 2, 8, 7, 3], [6, 5, 4, 3, 2, 1]]], requires_grad=True)
    kept = KMaxPool(3)(values)
    assert kept.tolist() == [[[9, 8, 7], [6, 5, 4]]]
    kept.sum().backward()
    assert values.grad.tolist() == [[[0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]]]


@pytest.mark.parametrize(("depth", "index"), [(9, 0), (9, 1), (17, 1)])
def test_a_block_whose_convolutions_return_zeros_is_its_pooling_and_shortcut(small, depth: int, index: int) -> None:
    block = small.build(f"vdcnn{depth}").blocks[index].eval()
    nn.init.zeros_(block.norm2.weight)
    values = torch.rand(2, block.conv1.in_channels, 16)  # not negative: the last ReLU changes nothing
    out = block(values)
    assert torch.equal(out, block.shortcut(block.pool(values)))
    assert out.shape == (2, block.conv1.out_channels, 8 if isinstance(block.pool, nn.MaxPool1d) else 16)


@pytest.mark.parametrize("length", [MIN_LENGTH, 64, 1024])
def test_output_has_one_score_for_each_class_at_any_length(length: int) -> None:
    model = build_model("vdcnn9", num_classes=5, width=0.05, length=length)
    assert model(torch.zeros(2, length, dtype=torch.int64)).shape == (2, 5)


def test_padding_is_a_vector_of_zeros_and_stays_one(small) -> None:
    model = small.build("vdcnn9")
    model(small.inputs("vdcnn9") * 0).sum().backward()
    assert not model.embedding.weight[0].any()
    assert not model.embedding.weight.grad.any()


@pytest.mark.parametrize("depth", [9, 49])
def test_first_losses_are_near_chance_at_any_depth(small, depth: int) -> None:
    scores = small.build(f"vdcnn{depth}", width=0.25)(small.inputs(f"vdcnn{depth}", 16))
    assert nn.functional.cross_entropy(scores, torch.arange(16) % 4).item() < 1.3 * math.log(4)

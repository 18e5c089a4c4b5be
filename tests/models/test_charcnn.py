from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from flexifed.errors import ConfigError
from flexifed.models import MODELS, build_model
from flexifed.models.charcnn import KERNELS, OneHot, min_length

FRAMES = {3: 36, 4: 35, 5: 34, 6: 34}  # of 1014 characters; 34 for the published model (Zhang et al. 2015, section 2.4)


@pytest.mark.parametrize("depth", KERNELS)
def test_full_width_models_have_as_many_parameters_as_the_published_shapes(depth: int) -> None:
    channels = [70, *[256] * depth]
    convolutions = sum(
        kernel * below * here + here for kernel, (below, here) in zip(KERNELS[depth], pairwise(channels), strict=True)
    )
    norms = (depth - 1) * 2 * 256
    sizes = [FRAMES[depth] * 256, 1024, 1024, 4]
    classifier = sum(below * here + here for below, here in pairwise(sizes))
    model = build_model(f"charcnn{depth}", num_classes=4, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + norms + classifier


@pytest.mark.parametrize("depth", KERNELS)
def test_layers_are_those_of_the_papers_tables(depth: int) -> None:
    model = build_model(f"charcnn{depth}", num_classes=4, device="meta")
    kinds = (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d)
    layers = [
        module.kernel_size[0] if isinstance(module, nn.Conv1d) else type(module).__name__
        for module in model.features.modules()
        if isinstance(module, kinds)
    ]
    norm, pool = "BatchNorm1d", "MaxPool1d"
    assert layers == [7, norm, pool, 7, norm, pool, *[3, norm] * (depth - 3), 3, pool]
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.5]


def test_characters_become_one_hot_vectors_and_unknown_ones_zeros() -> None:
    one_hot = OneHot(alphabet_size=3)(torch.tensor([[1, 3, 0, 2]]))
    assert one_hot.dtype == torch.float32
    assert one_hot.tolist() == [[[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]]


def test_one_hot_vectors_have_no_tensor_in_the_state() -> None:
    model = build_model("charcnn3", num_classes=4, device="meta")
    assert next(iter(model.state_dict())) == "features.1.conv.weight"


@pytest.mark.parametrize("depth", KERNELS)
def test_the_shortest_texts_leave_one_frame(depth: int) -> None:
    shortest = min_length(depth)
    model = MODELS[f"charcnn{depth}"](num_classes=2, width=0.01, length=shortest)
    assert model(torch.zeros(2, shortest, dtype=torch.int64)).shape == (2, 2)
    with pytest.raises(ConfigError, match=f"length is {shortest - 1}; CharCNN-{depth} needs at least {shortest}"):
        MODELS[f"charcnn{depth}"](num_classes=2, length=shortest - 1)


def test_first_losses_are_near_chance(small) -> None:
    model = small.build("charcnn3", width=0.5)
    scores = model(small.inputs("charcnn3", 16))
    loss = nn.functional.cross_entropy(scores, torch.arange(16) % 4).item()
    assert loss == pytest.approx(math.log(4), rel=0.1)
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            sigma = math.sqrt(2 / (module.kernel_size[0] * module.in_channels))
            assert module.weight.std().item() == pytest.approx(sigma, rel=5 / math.sqrt(2 * module.weight.numel()))
            assert not module.bias.any()

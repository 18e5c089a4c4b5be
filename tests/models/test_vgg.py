from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from flexifed.errors import ConfigError
from flexifed.models import MODELS, build_model

# Simonyan and Zisserman 2015, table 1: columns A, B, D and E, 3x3 convolutions only; 0 is a pooling.
CHANNELS = {
    "vgg11": (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    "vgg13": (64, 64, 0, 128, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    "vgg16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
    "vgg19": (64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4, 0),
}

VGGS = [name for name in MODELS if name.startswith("vgg")]


def seeded(name: str, seed: int = 0, width: float = 0.1) -> nn.Module:
    return build_model(name, num_classes=10, width=width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VGGS)
def test_full_width_models_have_the_papers_number_of_parameters(name: str) -> None:
    channels = [3, *filter(None, CHANNELS[name.removesuffix("_bn")])]
    convolutions = sum(9 * below * here + here for below, here in pairwise(channels))
    norms = 2 * sum(channels[1:]) if name.endswith("_bn") else 0
    classifier = (512 * 4096 + 4096) + (4096 * 4096 + 4096) + (4096 * 10 + 10)
    model = build_model(name, num_classes=10, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + norms + classifier
    assert 28e6 < convolutions + norms + classifier < 40e6


@pytest.mark.parametrize("name", VGGS)
def test_layers_are_those_of_the_papers_table(name: str) -> None:
    model = build_model(name, num_classes=10, device="meta")
    sequence = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.MaxPool2d)]
    layers = tuple(module.out_channels if isinstance(module, nn.Conv2d) else 0 for module in sequence)
    assert layers == CHANNELS[name.removesuffix("_bn")]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == (
        sum(map(bool, layers)) if name.endswith("_bn") else 0
    )


@pytest.mark.parametrize("name", VGGS)
def test_declared_layers_are_the_weight_layers_in_forward_order(name: str) -> None:
    model = seeded(name)
    called: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.register_forward_hook(lambda module, *_: called.append(module))
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert called == [module for layer in model.declared_layers() for module in layer.modules]


@pytest.mark.parametrize("name", ["vgg11", "vgg19_bn"])
@pytest.mark.parametrize(("in_channels", "num_classes"), [(3, 10), (1, 30)])
def test_output_has_one_score_for_each_class(name: str, in_channels: int, num_classes: int) -> None:
    model = build_model(name, num_classes=num_classes, in_channels=in_channels, width=0.05)
    assert model(torch.zeros(2, in_channels, 32, 32)).shape == (2, num_classes)


def test_initial_weights_have_the_papers_distributions() -> None:
    model = seeded("vgg13_bn", width=0.5)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            sigma, n = math.sqrt(2 / (9 * module.out_channels)), module.weight.numel()
            assert module.weight.std().item() == pytest.approx(sigma, rel=5 / math.sqrt(2 * n))
            assert abs(module.weight.mean().item()) < 5 * sigma / math.sqrt(n)
            assert not module.bias.any()
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            for tensor in (module.weight, module.bias):
                assert tensor.abs().max().item() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert module.bias.std().item() > 0
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.running_var == 1).all()
            assert not torch.cat([module.bias, module.running_mean, module.num_batches_tracked[None]]).any()


def test_one_seed_gives_the_same_bits_and_another_seed_others() -> None:
    first, again, other = (seeded("vgg11_bn", seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["features.0.conv.weight"], other["features.0.conv.weight"])


def test_weights_are_drawn_in_forward_order_so_that_common_layers_agree() -> None:
    shallow, deep, deeper = (seeded(name).state_dict() for name in ("vgg11_bn", "vgg16_bn", "vgg19_bn"))
    assert torch.equal(shallow["features.0.conv.weight"], deeper["features.0.conv.weight"])
    for position in range(7):
        key = f"features.{position}.conv.weight"
        assert torch.equal(deep[key], deeper[key])


def test_without_a_generator_the_global_seed_decides_and_models_differ() -> None:
    torch.manual_seed(5)
    first, second = (build_model("vgg11", num_classes=2, width=0.01).state_dict() for _ in range(2))
    torch.manual_seed(5)
    again = build_model("vgg11", num_classes=2, width=0.01).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["classifier.6.bias"], second["classifier.6.bias"])


def test_a_generator_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    seeded("vgg11", width=0.01)
    assert torch.equal(torch.get_rng_state(), before)


def test_meta_models_hold_shapes_only() -> None:
    model = build_model("vgg19_bn", num_classes=10, device="meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "vgg12"},
            "model is 'vgg12'; choose one of: vgg11, vgg13, vgg16, vgg19, vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn, "
            "resnet20, resnet32, resnet44, resnet56, charcnn3, charcnn4, charcnn5, charcnn6, vdcnn9, vdcnn17, vdcnn29, "
            "vdcnn49",
        ),
        ({"width": 0}, "width is 0; it is a factor on the number of channels and must be above 0 and below 64"),
        ({"width": -1}, "width is -1; it is a factor on the number of channels and must be above 0 and below 64"),
        (
            {"width": math.nan},
            "width is nan; it is a factor on the number of channels and must be above 0 and below 64",
        ),
        (
            {"width": math.inf},
            "width is inf; it is a factor on the number of channels and must be above 0 and below 64",
        ),
        ({"num_classes": 0}, "num_classes is 0; it must be a whole number of at least 1"),
        ({"num_classes": 2.5}, "num_classes is 2.5; it must be a whole number of at least 1"),
        ({"num_classes": 2**24 + 1}, "num_classes is 16777217; it must be at most 16777216"),
        ({"in_channels": -3}, "in_channels is -3; it must be a whole number of at least 1"),
        (
            {"length": 1014},
            "length is 1014, but vgg11 takes images, whose input has in_channels; leave it out",
        ),
        (
            {"name": "charcnn3", "in_channels": 3},
            "in_channels is 3, but charcnn3 takes texts, whose input has alphabet_size and length; leave it out",
        ),
        (
            {"name": "vdcnn9", "alphabet_size": 0},
            "alphabet_size is 0; it must be a whole number of at least 1",
        ),
        ({"name": "charcnn6", "length": 122}, "length is 122; CharCNN-6 needs at least 123 characters"),
        ({"name": "vdcnn29", "length": 56}, "length is 56; VDCNN-29 needs at least 57 characters"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(**{"name": "vgg11", "num_classes": 10, **arguments})
    assert str(error.value) == message


def test_a_boolean_is_not_a_number_of_classes() -> None:
    with pytest.raises(ConfigError, match="num_classes is True"):
        build_model("vgg11", num_classes=True)

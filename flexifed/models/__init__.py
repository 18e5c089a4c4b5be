"""The model families of the experiment, each a list of versions from shallow to deep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from flexifed.config import FAMILIES, FAMILY_INPUTS, WIDEST, InputKind
from flexifed.core.signature import ModelSignature, signature
from flexifed.errors import ConfigError, invalid_choice
from flexifed.models import charcnn, resnet, vdcnn, vgg
from flexifed.models.base import FamilyModel

_MOST_CHANNELS = 2**24
"""Largest number of classes, channels or characters; with more, tensor sizes overflow."""

MODELS: Mapping[str, Callable[..., FamilyModel]] = MappingProxyType(
    {
        f"vgg{depth}{suffix}": partial(vgg.VGG, depth, batch_norm=bool(suffix))
        for suffix in ("", "_bn")
        for depth in vgg.CONVOLUTIONS
    }
    | {f"resnet{depth}": partial(resnet.ResNet, depth) for depth in resnet.BLOCKS}
    | {f"charcnn{depth}": partial(charcnn.CharCNN, depth) for depth in charcnn.KERNELS}
    | {f"vdcnn{depth}": partial(vdcnn.VDCNN, depth) for depth in vdcnn.CONVOLUTIONS}
)
"""All models by name: every version of every family."""

INPUT_OPTIONS: Mapping[InputKind, tuple[str, ...]] = MappingProxyType(
    {"image": ("in_channels",), "text": ("alphabet_size", "length")}
)
"""The options of `build_model` that describe a model's input, by kind of input."""


def build_model(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    in_channels: int | None = None,
    alphabet_size: int | None = None,
    length: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Build a model and draw its weights.

    Image models take float tensors (batch, in_channels, 32, 32); text models take character indices, int64
    (batch, length), from 0 (padding or unknown) to `alphabet_size`. All return scores (batch, num_classes).

    Args:
        name: `vgg11`, `vgg13`, `vgg16`, `vgg19`, and the same with `_bn` for batch norm; `resnet20`, `resnet32`,
            `resnet44`, `resnet56`; `charcnn3` to `charcnn6`; `vdcnn9`, `vdcnn17`, `vdcnn29`, `vdcnn49`.
        num_classes: size of the output, at least 1.
        width: factor on all channels, above 0 and below 64. It does not change the depth, and so not the layers in
            common.
        in_channels: image models only: channels of the input, at least 1. Default: 3.
        alphabet_size: text models only: number of characters that have an index of their own, at least 1. Default: 70
            for CharCNN, 69 for VDCNN.
        length: text models only: characters of every input. Default: 1014 for CharCNN, 1024 for VDCNN.
        generator: CPU generator from which the weights are drawn. Default: one that is seeded from PyTorch's global
            generator.
        device: device of the weights; `meta` builds a model of shapes only, and draws nothing.

    Raises:
        ConfigError: the name is unknown, a number is out of range, or the model's kind of input does not have an
            option that is given.

    >>> build_model("vgg11_bn", num_classes=10, width=0.1)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> build_model("charcnn3", num_classes=4, width=0.1)(torch.zeros(2, 1014, dtype=torch.int64)).shape
    torch.Size([2, 4])
    """
    if not isinstance(name, str) or name not in MODELS:
        raise ConfigError(invalid_choice("model", name, MODELS))
    if isinstance(width, bool) or not (isinstance(width, int | float) and 0 < width < WIDEST):
        raise ConfigError(
            f"width is {width!r}; it is a factor on the number of channels and must be above 0 and below {WIDEST:g}"
        )
    given = {"in_channels": in_channels, "alphabet_size": alphabet_size, "length": length}
    input_options = {option: value for option, value in given.items() if value is not None}
    for option, value in {"num_classes": num_classes, **input_options}.items():
        if isinstance(value, bool) or not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"{option} is {value!r}; it must be a whole number of at least 1")
        if value > _MOST_CHANNELS:
            raise ConfigError(f"{option} is {value}; it must be at most {_MOST_CHANNELS}")
    kind = input_kind(name)
    for option, value in input_options.items():
        if option not in INPUT_OPTIONS[kind]:
            valid = " and ".join(INPUT_OPTIONS[kind])
            raise ConfigError(f"{option} is {value!r}, but {name} takes {kind}s, whose input has {valid}; leave it out")
    with torch.device("meta"):
        model = MODELS[name](num_classes=num_classes, width=width, **input_options)
    if torch.device(device).type == "meta":
        return model
    # `to_empty` would import sympy for its meta kernels, which takes every process 2 s.
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()).item()))
    model.initialise(generator)
    return model.to(device)


def input_kind(name: str) -> InputKind:
    """The kind of input that a model takes: `image` or `text`.

    Raises:
        ConfigError: the name is unknown.
    """
    for family, versions in FAMILIES.items():
        if name in versions:
            return FAMILY_INPUTS[family]
    raise ConfigError(invalid_choice("model", name, MODELS))


def model_signature(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    in_channels: int | None = None,
    alphabet_size: int | None = None,
    length: int | None = None,
) -> ModelSignature:
    """The signature of a model, without allocating its weights. Takes the arguments of `build_model`."""
    return signature(
        build_model(
            name,
            num_classes=num_classes,
            width=width,
            in_channels=in_channels,
            alphabet_size=alphabet_size,
            length=length,
            device="meta",
        )
    )

"""The model families of the experiment, each a list of versions from shallow to deep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from flexifed.config import FAMILIES, FAMILY_INPUTS, InputKind
from flexifed.core.signature import ModelSignature, signature
from flexifed.errors import ConfigError, invalid_choice
from flexifed.models import charcnn, resnet, vdcnn, vgg
from flexifed.models.base import FamilyModel

_MOST_CHANNELS = 2**24
"""Of classes, channels and characters; beyond it sizes of tensors overflow."""

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
"""All models by name; every version of every family is one of them."""

INPUT_OPTIONS: Mapping[InputKind, tuple[str, ...]] = MappingProxyType(
    {"image": ("in_channels",), "text": ("alphabet_size", "length")}
)
"""What can be said about the input of a model, by kind of input."""


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

    Models of images take float (batch, in_channels, 32, 32); models of texts take indices of characters, int64
    (batch, length), from 0 (padding or unknown) to `alphabet_size`. All return scores (batch, num_classes).

    Args:
        name: `vgg11`, `vgg13`, `vgg16`, `vgg19`, and the same with `_bn` for batch norm; `resnet20`, `resnet32`,
            `resnet44`, `resnet56`; `charcnn3` to `charcnn6`; `vdcnn9`, `vdcnn17`, `vdcnn29`, `vdcnn49`.
        num_classes: size of the output, at least 1.
        width: factor on all channels, above 0; depth, and so what models have in common, stays.
        in_channels: images only: channels of the input, at least 1; None for 3.
        alphabet_size: texts only: characters with an index of their own, at least 1; None for the family's own (70 for
            CharCNN, 69 for VDCNN).
        length: texts only: characters of every input; None for the family's own (1014 and 1024).
        generator: a CPU generator, the source of the weights; None seeds one from PyTorch's global generator.
        device: where the weights end up; `meta` makes a model of shapes only, and draws nothing.

    Raises:
        ConfigError: an unknown name, a number out of range, or an option that the model's kind of input does not have.

    >>> build_model("vgg11_bn", num_classes=10, width=0.1)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> build_model("charcnn3", num_classes=4, width=0.1)(torch.zeros(2, 1014, dtype=torch.int64)).shape
    torch.Size([2, 4])
    """
    if name not in MODELS:
        raise ConfigError(invalid_choice("model", name, MODELS))
    if isinstance(width, bool) or not (isinstance(width, int | float) and 0 < width < math.inf):
        raise ConfigError(f"width is {width!r}; it is a factor on the number of channels and must be above 0")
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
    # Not `to_empty`, which would import sympy for its meta kernels: 2 s for every process.
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()).item()))
    model.initialise(generator)
    return model.to(device)


def input_kind(name: str) -> InputKind:
    """What a model takes: `image` or `text`.

    Raises:
        ConfigError: an unknown name.
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
    """The signature of a model, without allocating its weights; arguments as for `build_model`."""
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

"""The model families of the experiment, each a list of versions from shallow to deep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from flexifed.config import FAMILIES
from flexifed.core.signature import ModelSignature, signature
from flexifed.errors import ConfigError, invalid_choice
from flexifed.models.vgg import CONVOLUTIONS, VGG

MODELS: Mapping[str, Callable[..., VGG]] = MappingProxyType(
    {
        f"vgg{depth}{suffix}": partial(VGG, depth, batch_norm=bool(suffix))
        for suffix in ("", "_bn")
        for depth in CONVOLUTIONS
    }
)
"""All models by name; every version of every family is one of them."""


def build_model(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    in_channels: int = 3,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Build a model and draw its weights.

    Args:
        name: `vgg11`, `vgg13`, `vgg16`, `vgg19`, and the same with `_bn` for batch norm.
        num_classes: size of the output, at least 1.
        width: factor on all channels, above 0; depth, and so what models have in common, stays.
        in_channels: channels of the input, at least 1.
        generator: a CPU generator, the source of the weights; None seeds one from PyTorch's global generator.
        device: where the weights end up; `meta` makes a model of shapes only, and draws nothing.

    Raises:
        ConfigError: an unknown name, or a number out of range.

    >>> build_model("vgg11_bn", num_classes=10, width=0.1)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if name not in MODELS:
        raise ConfigError(invalid_choice("model", name, MODELS))
    if isinstance(width, bool) or not (isinstance(width, int | float) and 0 < width < math.inf):
        raise ConfigError(f"width is {width!r}; it is a factor on the number of channels and must be above 0")
    for field, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if isinstance(value, bool) or not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"{field} is {value!r}; it must be a whole number of at least 1")
    with torch.device("meta"):
        model = MODELS[name](num_classes=num_classes, width=width, in_channels=in_channels)
    if torch.device(device).type == "meta":
        return model
    # Not `to_empty`, which would import sympy for its meta kernels: 2 s for every process.
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()).item()))
    model.initialise(generator)
    return model.to(device)


def family_versions(family: str) -> tuple[str, ...]:
    """Model names of a family's versions, V1 first.

    Raises:
        ConfigError: an unknown family.
    """
    if family not in FAMILIES:
        raise ConfigError(invalid_choice("family", family, FAMILIES))
    return FAMILIES[family]


def model_signature(name: str, *, num_classes: int, width: float = 1.0, in_channels: int = 3) -> ModelSignature:
    """The signature of a model, without allocating its weights; arguments as for `build_model`."""
    return signature(build_model(name, num_classes=num_classes, width=width, in_channels=in_channels, device="meta"))

"""What all families share: the interface of a version, the drawing of weights, and the width factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from flexifed.core.signature import NORMALISATIONS, DeclaredLayer, Role


class FamilyModel(nn.Module):
    """A version of a family: declares its layers, and draws its weights from a generator.

    Attributes:
        he_mode: what the variance of a convolution's weights is scaled to: `fan_in` keeps the size of the forward
            signal, `fan_out` that of the gradient (He et al. 2015, section 2.2).
    """

    he_mode: Literal["fan_in", "fan_out"] = "fan_in"

    def declared_layers(self) -> Sequence[DeclaredLayer]:
        """The layers, in forward order."""
        raise NotImplementedError

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights, in forward order, so that models with a common prefix get equal values there from one seed.

        Convolutions N(0, sqrt(2 / fan)) with zero bias, where the fan is kernel size x in_channels (`fan_in`) or
        kernel size x out_channels (`fan_out`); batch norm weight 1 and bias 0; embedding and linear layers by PyTorch's
        defaults.

        Args:
            generator: a CPU generator.

        Raises:
            TypeError: a layer has a module of another kind, whose weights would be left undefined.
        """
        for module in (module for layer in self.declared_layers() for module in layer.modules):
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                channels = module.in_channels if self.he_mode == "fan_in" else module.out_channels
                sigma = math.sqrt(2 / (math.prod(module.kernel_size) * channels))
                nn.init.normal_(module.weight, 0.0, sigma, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
                nn.init.zeros_(module.weight.data[0])  # padding
            elif isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)  # as in `nn.Linear.reset_parameters`
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
            else:
                raise TypeError(
                    f"there is no rule for the weights of {module}; override {type(self).__name__}.initialise"
                )


class PaddedShortcut(nn.Module):
    """A shortcut without weights to a layer with more channels: the identity, followed by channels of zeros.

    This is option A of He et al. 2016 (section 3.3). With a stride it keeps every `stride`-th position of each axis.

    Args:
        added_channels: number of channels of zeros, at least 0.
        stride: stride of the convolution that the shortcut bypasses.
    """

    def __init__(self, added_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.added_channels = added_channels
        self.stride = stride

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """From (batch, channels, ...) to (batch, channels + added_channels, ...), with one or two axes after them."""
        axes = values.dim() - 2
        kept = (slice(None), slice(None), *[slice(None, None, self.stride)] * axes)
        return functional.pad(values[kept], (0, 0) * axes + (0, self.added_channels))


def chain_layers(*parts: tuple[nn.Sequential, Role]) -> list[DeclaredLayer]:
    """Declare the layers of a plain chain of modules.

    Each convolution or linear layer is a layer, together with a normalisation right after it. Activations, poolings and
    other modules without parameters count as `before` of the layer after them.

    Args:
        parts: consecutive parts of the chain, which may be nested, each with the role of its layers.
    """
    layers: list[DeclaredLayer] = []
    before: list[nn.Module | str] = []
    for part, role in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                layers.append(DeclaredLayer((module,), role, tuple(before)))
                before = []
            elif isinstance(module, NORMALISATIONS) and layers and not before:
                layers[-1] = replace(layers[-1], modules=(*layers[-1].modules, module))
            elif not isinstance(module, nn.Sequential):
                before.append(module)
    return layers


PLUS_SHORTCUT = "plus the block's input, passed through"
"""Marks in a layer's `before` that the block's output and its shortcut are added; the shortcut's module follows."""


def scaled(channels: int, width: float) -> int:
    """The number of channels times the width factor, rounded, at least 1."""
    return max(1, round(channels * width))

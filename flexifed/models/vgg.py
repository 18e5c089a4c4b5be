"""VGG-11/13/16/19 for 32x32 images, plain and with batch norm (Simonyan and Zisserman 2015, table 1).

As in FlexiFed's experiment: 3x3 convolutions, with a bias even where batch norm follows, five poolings, and a
classifier dropout - 512x4096 - ReLU - dropout - 4096x4096 - ReLU - 4096xclasses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from flexifed.core.signature import DeclaredLayer
from flexifed.models.base import FamilyModel, chain_layers, scaled

CONVOLUTIONS: Mapping[int, tuple[int, int, int, int, int]] = MappingProxyType(
    {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
)
"""Convolutions in each of the five stages, by depth."""

CHANNELS = (64, 128, 256, 512, 512)
HIDDEN = 4096


class VGG(FamilyModel):
    """A VGG for inputs of shape (batch, in_channels, 32, 32).

    Args:
        depth: 11, 13, 16 or 19.
        num_classes: size of the output.
        batch_norm: whether a batch norm follows each convolution.
        width: factor on all channels and on the classifier's hidden size; at least one channel is left.
        in_channels: channels of the input.
    """

    he_mode = "fan_out"  # FlexiFed's N(0, sqrt(2 / (9 * out_channels)))

    def __init__(
        self, depth: int, *, num_classes: int, batch_norm: bool = True, width: float = 1.0, in_channels: int = 3
    ) -> None:
        super().__init__()
        # One block for each convolution: pooling (first in a stage), convolution, norm, ReLU.
        blocks: list[nn.Sequential] = []
        previous = in_channels
        for stage, count in enumerate(CONVOLUTIONS[depth]):
            channels = scaled(CHANNELS[stage], width)
            for position in range(count):
                block = nn.Sequential()
                if stage > 0 and position == 0:
                    block.add_module("pool", nn.MaxPool2d(2))
                block.add_module("conv", nn.Conv2d(previous, channels, kernel_size=3, padding=1))
                if batch_norm:
                    block.add_module("norm", nn.BatchNorm2d(channels))
                block.add_module("relu", nn.ReLU(inplace=True))
                blocks.append(block)
                previous = channels
        self.features = nn.Sequential(*blocks, nn.MaxPool2d(2))
        hidden = scaled(HIDDEN, width)
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(previous, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores of shape (batch, num_classes)."""
        scores: torch.Tensor = self.classifier(self.features(images).flatten(1))
        return scores

    def declared_layers(self) -> Sequence[DeclaredLayer]:
        """The convolutions, each with its batch norm, then the three linear layers."""
        return chain_layers((self.features, "feature"), (self.classifier, "classifier"))

"""ResNet-20/32/44/56 for 32x32 images (He et al. 2016, section 4.2): 6n + 2 layers, 16-32-64 channels.

Shortcuts are option A of that paper, as in its CIFAR-10 experiments: where the shape changes, they keep every second
pixel and add channels of zeros, without weights. So the published numbers of parameters hold (table 6), and a model has
as many weight layers as its name says. FlexiFed does not say which shortcuts it uses. With projections the layers in
common would be the same, since those of any two versions end within the first stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from flexifed.core.signature import DeclaredLayer
from flexifed.models.base import PLUS_SHORTCUT, FamilyModel, PaddedShortcut, scaled

BLOCKS: Mapping[int, int] = MappingProxyType({20: 3, 32: 5, 44: 7, 56: 9})
"""Blocks of two convolutions in each of the three stages, by depth."""

CHANNELS = (16, 32, 64)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them that is added before the last ReLU.

    Args:
        in_channels: channels of the input.
        channels: channels of both convolutions, at least `in_channels`.
        stride: stride of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            nn.Identity() if (in_channels, stride) == (channels, 1) else PaddedShortcut(channels - in_channels, stride)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """From (batch, in_channels, height, width) to (batch, channels, height / stride, width / stride)."""
        inner = self.relu(self.norm1(self.conv1(images)))
        outputs: torch.Tensor = self.relu(self.norm2(self.conv2(inner)) + self.shortcut(images))
        return outputs


class ResNet(FamilyModel):
    """A ResNet for inputs of shape (batch, in_channels, 32, 32).

    Args:
        depth: 20, 32, 44 or 56.
        num_classes: size of the output.
        width: factor on all channels; at least one channel is left.
        in_channels: channels of the input.
    """

    he_mode = "fan_out"  # as in FlexiFed's VGGs

    def __init__(self, depth: int, *, num_classes: int, width: float = 1.0, in_channels: int = 3) -> None:
        super().__init__()
        previous = scaled(CHANNELS[0], width)
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv2d(in_channels, previous, kernel_size=3, padding=1, bias=False))
        self.stem.add_module("norm", nn.BatchNorm2d(previous))
        self.stem.add_module("relu", nn.ReLU(inplace=True))
        blocks: list[ResidualBlock] = []
        for stage, stage_channels in enumerate(CHANNELS):
            channels = scaled(stage_channels, width)
            for position in range(BLOCKS[depth]):
                blocks.append(ResidualBlock(previous, channels, stride=2 if stage > 0 and position == 0 else 1))
                previous = channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(previous, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores of shape (batch, num_classes)."""
        scores: torch.Tensor = self.classifier(self.pool(self.blocks(self.stem(images))).flatten(1))
        return scores

    def declared_layers(self) -> Sequence[DeclaredLayer]:
        """The convolutions, each with its batch norm, then the linear layer.

        The way in which a block's shortcut joins is declared with the layer after the block.
        """
        conv, norm, relu = self.stem
        layers = [DeclaredLayer((conv, norm))]
        before: tuple[nn.Module | str, ...] = (relu,)
        for block in self.blocks:
            assert isinstance(block, ResidualBlock)
            layers.append(DeclaredLayer((block.conv1, block.norm1), before=before))
            layers.append(DeclaredLayer((block.conv2, block.norm2), before=(block.relu,)))
            before = (PLUS_SHORTCUT, block.shortcut, block.relu)
        layers.append(DeclaredLayer((self.classifier,), "classifier", (*before, self.pool)))
        return layers

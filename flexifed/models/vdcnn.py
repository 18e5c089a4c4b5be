"""VDCNN-9/17/29/49 (Conneau et al. 2017): a character embedding, a convolution, then blocks of two convolutions.

The depth counts convolutions of width 3; their number in each of the four stages is that of the paper's table 2. The
length is halved by max pooling ("VGG-like"), the best of the paper's three ways.

Shortcuts are optional in the paper (figure 1), which finds that they help the deepest model. Here all versions have
them: a shortcut is part of what the layer above it computes, so a version with and a version without shortcuts would
have nothing in common beyond their first block. Departures from the paper:

- A shortcut joins before its block's last ReLU (He et al. 2016). Where the channels double it adds zeros instead of a
  1x1 convolution, so that all weights are those of the paper's layers.
- Space, padding and unknown characters share index 0, a vector of zeros, where the paper counts them among its 69. One
  encoding of a text can then be used for CharCNN too (`flexifed.data.agnews`).

The weights of convolutions follow He et al. 2015, as in the paper; linear layers have PyTorch's default. The signal
that shortcuts carry to the classifier grows with depth, and He's larger weights there would start VDCNN-49 at losses
above 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from flexifed.config import TEXT_LENGTHS
from flexifed.core.signature import DeclaredLayer
from flexifed.errors import ConfigError
from flexifed.models.base import (
    PLUS_SHORTCUT,
    FamilyModel,
    PaddedShortcut,
    chain_layers,
    scaled,
)

CONVOLUTIONS: Mapping[int, tuple[int, int, int, int]] = MappingProxyType(
    {9: (2, 2, 2, 2), 17: (4, 4, 4, 4), 29: (10, 10, 4, 4), 49: (16, 16, 10, 6)}
)
"""Convolutions in the blocks of each of the four stages, by depth."""

CHANNELS = (64, 128, 256, 512)
EMBEDDING = 16
HIDDEN = 2048
KEPT = 8
MIN_LENGTH = 57
"""Shortest input: halved three times, each time rounded up, it leaves the eight frames that k-max pooling keeps."""


class KMaxPool(nn.Module):
    """Keep the k largest values of each channel, in their original order.

    Which of several equal values are kept is not defined.

    Args:
        k: number of values to keep.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """From (batch, channels, length) to (batch, channels, k)."""
        return values.gather(2, values.topk(self.k, dim=2).indices.sort(dim=2).values)


class ConvolutionalBlock(nn.Module):
    """Two convolutions of width 3 with batch norm, and a shortcut around them, optionally after a pooling.

    Args:
        in_channels: channels of the input.
        channels: channels of both convolutions, at least `in_channels`.
        pool: whether to halve the length first; the shortcut begins after the pooling.
    """

    def __init__(self, in_channels: int, channels: int, *, pool: bool) -> None:
        super().__init__()
        self.pool = nn.MaxPool1d(kernel_size=3, stride=2, padding=1) if pool else nn.Identity()
        self.conv1 = nn.Conv1d(in_channels, channels, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm1d(channels)
        self.conv2 = nn.Conv1d(channels, channels, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm1d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if in_channels == channels else PaddedShortcut(channels - in_channels)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """From (batch, in_channels, length) to (batch, channels, length), or half the length, rounded up."""
        pooled = self.pool(values)
        inner = self.relu(self.norm1(self.conv1(pooled)))
        outputs: torch.Tensor = self.relu(self.norm2(self.conv2(inner)) + self.shortcut(pooled))
        return outputs


class VDCNN(FamilyModel):
    """A VDCNN for character indices, int64 of shape (batch, length), from 0 to `alphabet_size`.

    Its embedding is zero until `initialise` draws it; `build_model` calls it.

    Args:
        depth: 9, 17, 29 or 49.
        num_classes: size of the output.
        width: factor on all channels and on the classifier's hidden sizes; at least one channel is left. The embedding
            always has 16.
        alphabet_size: number of characters that have an index of their own, from 1; 0 is padding or unknown.
        length: characters of every input.

    Raises:
        ConfigError: the texts are too short for the poolings.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int,
        width: float = 1.0,
        alphabet_size: int = 69,
        length: int = TEXT_LENGTHS["vdcnn"],
    ) -> None:
        super().__init__()
        if length < MIN_LENGTH:
            raise ConfigError(f"length is {length}; VDCNN-{depth} needs at least {MIN_LENGTH} characters")
        previous = scaled(CHANNELS[0], width)
        # `nn.Embedding(...)` would import torch.compile on the device `meta`, just to draw nothing.
        self.embedding = nn.Embedding.from_pretrained(
            torch.zeros(alphabet_size + 1, EMBEDDING), freeze=False, padding_idx=0
        )
        # Without batch norm and ReLU: the first block follows directly (the paper's figure 1).
        self.stem = nn.Conv1d(EMBEDDING, previous, kernel_size=3, padding=1)
        blocks: list[ConvolutionalBlock] = []
        for stage, count in enumerate(CONVOLUTIONS[depth]):
            channels = scaled(CHANNELS[stage], width)
            for position in range(count // 2):
                blocks.append(ConvolutionalBlock(previous, channels, pool=stage > 0 and position == 0))
                previous = channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = KMaxPool(KEPT)
        hidden = scaled(HIDDEN, width)
        self.classifier = nn.Sequential(
            nn.Linear(KEPT * previous, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Class scores of shape (batch, num_classes)."""
        embedded = self.embedding(indices).transpose(1, 2)
        scores: torch.Tensor = self.classifier(self.pool(self.blocks(self.stem(embedded))).flatten(1))
        return scores

    def declared_layers(self) -> Sequence[DeclaredLayer]:
        """The embedding, the convolutions, each with its batch norm, then the three linear layers.

        The way in which a block's shortcut joins is declared with the layer after the block.
        """
        layers = [DeclaredLayer((self.embedding,)), DeclaredLayer((self.stem,))]
        before: tuple[nn.Module | str, ...] = ()
        for block in self.blocks:
            assert isinstance(block, ConvolutionalBlock)
            pool = () if isinstance(block.pool, nn.Identity) else (block.pool,)
            layers.append(DeclaredLayer((block.conv1, block.norm1), before=(*before, *pool)))
            layers.append(DeclaredLayer((block.conv2, block.norm2), before=(block.relu,)))
            before = (PLUS_SHORTCUT, block.shortcut, block.relu)
        first, *others = chain_layers((self.classifier, "classifier"))
        layers.append(DeclaredLayer(first.modules, first.role, (*before, self.pool)))
        return [*layers, *others]

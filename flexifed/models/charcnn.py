"""CharCNN-3/4/5/6: the small model of Zhang, Zhao and LeCun 2015 (section 2.4), and versions with fewer convolutions.

CharCNN-6 has the paper's six convolutions, max pooling of size 3 after the first, second and last, and three linear
layers. The number counts convolutions; shallower versions leave out inner ones (the third to fifth), as FlexiFed's
reproducers do.

Two departures from Zhang et al.:

- All convolutions but the last have a batch norm. This makes the last one different from the inner ones, so that
  versions n and above have exactly their first n - 1 convolutions in common.
- The weights are those of `FamilyModel.initialise`, with which the first losses are near chance (1.4). Zhang et al.
  draw all of them from N(0, 0.05): over the first linear layer's 9,216 inputs that multiplies the signal's variance by
  about twenty, CharCNN-3 starts at a loss of about 15, and the first steps of SGD at 0.01 overshoot by ten times that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from flexifed.config import TEXT_LENGTHS
from flexifed.core.signature import DeclaredLayer
from flexifed.errors import ConfigError
from flexifed.models.base import FamilyModel, chain_layers, scaled

KERNELS: Mapping[int, tuple[int, ...]] = MappingProxyType({depth: (7, 7, *[3] * (depth - 2)) for depth in (3, 4, 5, 6)})
"""Kernel sizes of the convolutions, by depth."""

CHANNELS = 256
HIDDEN = 1024
POOL = 3


class OneHot(nn.Module):
    """Encode characters as one-hot vectors (Zhang et al. 2015, section 2.2). Has no weights.

    Args:
        alphabet_size: number of characters that have an index of their own, from 1. Index 0, for padding and unknown
            characters, becomes a vector of zeros.
    """

    def __init__(self, alphabet_size: int) -> None:
        super().__init__()
        self.alphabet_size = alphabet_size

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """From int64 (batch, length) to float (batch, alphabet_size, length)."""
        characters = torch.arange(1, self.alphabet_size + 1, device=indices.device)
        return (indices.unsqueeze(1) == characters.unsqueeze(1)).to(torch.get_default_dtype())


class CharCNN(FamilyModel):
    """A CharCNN for character indices, int64 of shape (batch, length), from 0 to `alphabet_size`.

    Args:
        depth: number of convolutions: 3, 4, 5 or 6.
        num_classes: size of the output.
        width: factor on all channels and on the classifier's hidden sizes; at least one channel is left.
        alphabet_size: number of characters that have an index of their own, from 1; 0 is padding or unknown.
        length: characters of every input.

    Raises:
        ConfigError: the texts are too short for the convolutions.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int,
        width: float = 1.0,
        alphabet_size: int = 70,
        length: int = TEXT_LENGTHS["charcnn"],
    ) -> None:
        super().__init__()
        channels = scaled(CHANNELS, width)
        blocks: list[nn.Sequential] = []  # one for each convolution: convolution, norm, ReLU, pooling
        previous, frames = alphabet_size, length
        for position, kernel in enumerate(KERNELS[depth]):
            is_last = position == depth - 1
            block = nn.Sequential()
            block.add_module("conv", nn.Conv1d(previous, channels, kernel_size=kernel))
            if not is_last:
                block.add_module("norm", nn.BatchNorm1d(channels))
            block.add_module("relu", nn.ReLU(inplace=True))
            frames -= kernel - 1
            if position < 2 or is_last:
                block.add_module("pool", nn.MaxPool1d(POOL))
                frames //= POOL
            blocks.append(block)
            previous = channels
        if frames < 1:
            raise ConfigError(f"length is {length}; CharCNN-{depth} needs at least {min_length(depth)} characters")
        self.features = nn.Sequential(OneHot(alphabet_size), *blocks)
        hidden = scaled(HIDDEN, width)
        self.classifier = nn.Sequential(
            nn.Linear(frames * channels, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Class scores of shape (batch, num_classes)."""
        scores: torch.Tensor = self.classifier(self.features(indices).flatten(1))
        return scores

    def declared_layers(self) -> Sequence[DeclaredLayer]:
        """The convolutions, each with its batch norm, then the three linear layers."""
        return chain_layers((self.features, "feature"), (self.classifier, "classifier"))


def min_length(depth: int) -> int:
    """The shortest input, in characters, that leaves one frame after the last pooling.

    >>> [min_length(depth) for depth in KERNELS]
    [69, 87, 105, 123]
    """
    frames = 1
    for position, kernel in reversed(list(enumerate(KERNELS[depth]))):
        if position < 2 or position == depth - 1:
            frames *= POOL
        frames += kernel - 1
    return frames

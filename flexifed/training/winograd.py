"""3x3 convolutions with fewer multiplications, for CPUs: Winograd's minimal filtering F(m x m, 3x3).

A tile of m x m outputs Y, with m = 4 or 2, is computed from its (m + 2) x (m + 2) inputs d and the filter g as

    Y = A' [(G g G') * (B' d B)] A

This takes 2.25 (m = 4) or 4 (m = 2) multiplications for each value instead of nine, and summed over input channels they
are matrix products. Everything is computed in the inputs' own precision, and gradients are those of the same formula.
Only rounding differs from a direct convolution. In float32 the errors of outputs and gradients, relative to their size,
are 2e-6 to 3.3e-6 with m = 4 and below 1e-6 with m = 2 (root mean squares, measured on CPUs). Those of a direct
convolution are 1e-7 to 2e-6, and 3e-4 with TF32.

Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", sections 4.1 to 4.3, whose matrices
and names these are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_FEWEST_CHANNELS = 128
"""Fewest input and output channels of a convolution; with fewer, the transforms cost what the products save."""
_NUMBERS_AT_ONCE = 600_000
"""Size of an intermediate tensor: 2.4 MB in float32, so that one operation's output is in the cache for the next."""
_TILES_AT_ONCE = 64
"""Fewest tiles to compute at once, so that the transformed weights, up to 38 MB, are seldom read from memory."""
_FEWEST_TILES = 32
"""Fewest tiles of a batch; with fewer, transforming the weights takes longer than a direct convolution."""


@dataclass(frozen=True)
class _Transforms:
    """The matrices of F(m x m, 3x3) for both axes at once: Kronecker products, which apply to flattened squares.

    Attributes:
        tile: m.
        inputs: B' for both axes, ((m + 2)^2, (m + 2)^2).
        weight: G for both axes, ((m + 2)^2, 9).
        outputs: A' for both axes, (m^2, (m + 2)^2).
    """

    tile: int
    inputs: torch.Tensor
    weight: torch.Tensor
    outputs: torch.Tensor


_MATRICES = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}
"""B', G and A' for one axis, by m."""


@lru_cache
def _transforms(tile: int, dtype: torch.dtype) -> _Transforms:
    one_axis = (torch.tensor(rows, dtype=torch.float64, device="cpu") for rows in _MATRICES[tile])
    return _Transforms(tile, *(torch.kron(matrix, matrix).to(dtype) for matrix in one_axis))


class WinogradConv2d(nn.Conv2d):
    """A convolution for which `is_suitable` holds, computed by `convolve`."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """From (batch, in_channels, height, width) to (batch, out_channels, height, width)."""
        return convolve(images, self.weight, self.bias)


def use_winograd(model: nn.Module) -> None:
    """Switch a model's suitable convolutions to Winograd's algorithm: the modules stay, and change their class."""
    for module in model.modules():
        if type(module) is nn.Conv2d and is_suitable(module):
            module.__class__ = WinogradConv2d


def is_suitable(convolution: nn.Conv2d) -> bool:
    """Whether a convolution is 3x3 with stride and padding 1, and has enough channels to become faster."""
    return (
        convolution.kernel_size == (3, 3)
        and convolution.stride == convolution.padding == convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and convolution.groups == 1
        and min(convolution.in_channels, convolution.out_channels) >= _FEWEST_CHANNELS
    )


def convolve(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `conv2d(images, weight, bias, padding=1)`, with other rounding.

    That function itself is called if images have an odd size, if they are too few for Winograd's algorithm to be
    faster, and under autocast.

    Args:
        images: (batch, in_channels, height, width), on a CPU.
        weight: (out_channels, in_channels, 3, 3).
        bias: (out_channels,).

    Returns:
        (batch, out_channels, height, width), with channels last in memory.
    """
    count, _, height, width = images.shape
    tile = 2 if height % 4 or width % 4 else 4
    too_few = count * (height // tile) * (width // tile) < _FEWEST_TILES
    if too_few or height % 2 or width % 2 or torch.is_autocast_enabled("cpu"):
        return functional.conv2d(images, weight, bias, padding=1)
    result: torch.Tensor = _Convolution.apply(images, weight, bias, _transforms(tile, images.dtype))
    return result


class _Convolution(torch.autograd.Function):
    """Winograd's convolution with its gradients.

    In the comments there are k images of r x s tiles, each of m x m outputs and a x a inputs, and c input and o output
    channels. The transformed inputs are not saved for the backward pass: computing them again is as fast as reading
    them.
    """

    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transforms: _Transforms
    ) -> torch.Tensor:
        """See `convolve`; height and width are multiples of m."""
        size, tile = len(transforms.inputs), transforms.tile
        grid = images.shape[2] // tile, images.shape[3] // tile
        filters = _transformed_weight(weight, transforms)
        padded = _padded(images)
        shape = len(images), len(weight), *images.shape[2:]
        outputs = torch.empty(shape, dtype=images.dtype, memory_format=torch.channels_last)
        by_tile = outputs.permute(0, 2, 3, 1).view(len(images), grid[0], tile, grid[1], tile, len(weight))
        for part in _parts(len(images), grid, size * max(weight.shape[:2])):
            inputs = _transformed_inputs(padded[part], grid, transforms)
            products = torch.bmm(inputs, filters.permute(1, 2, 0))  # (a a, k r s, o)
            tiles = (transforms.outputs @ products.flatten(1)).view(tile, tile, -1, *grid, len(weight))
            if bias is not None:
                tiles += bias
            by_tile[part] = tiles.permute(2, 3, 0, 4, 1, 5)
        ctx.save_for_backward(padded, filters)
        ctx.transforms, ctx.grid, ctx.has_bias = transforms, grid, bias is not None
        return outputs  # not a view of it, so that the next operation may work in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of images, weight and bias, each of its shape, from the gradient of the outputs."""
        padded, filters = ctx.saved_tensors
        transforms, grid = ctx.transforms, ctx.grid
        size, tile = len(transforms.inputs), transforms.tile
        out_channels, _, in_channels = filters.shape
        gradient = gradient.permute(0, 2, 3, 1).contiguous()
        outputs = gradient.view(-1, grid[0], tile, grid[1], tile, out_channels).permute(2, 4, 0, 1, 3, 5)
        grad_padded = torch.empty_like(padded)
        grad_filters = filters.new_zeros(size, out_channels, in_channels)
        for part in _parts(len(padded), grid, size * max(out_channels, in_channels)):
            inputs = _transformed_inputs(padded[part], grid, transforms)
            tiles = outputs[:, :, part].reshape(tile * tile, -1)
            products = (transforms.outputs.T @ tiles).view(size, -1, out_channels)
            grad_filters.baddbmm_(products.transpose(1, 2), inputs)
            grad_inputs = torch.bmm(products, filters.transpose(0, 1))  # (a a, k r s, c)
            _add_overlapping(grad_padded[part], transforms.inputs.T @ grad_inputs.flatten(1), grid, tile)
        grad_weight = transforms.weight.T.expand(out_channels, 9, size) @ grad_filters.transpose(0, 1)
        return (
            grad_padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2),
            grad_weight.view(out_channels, 3, 3, in_channels).permute(0, 3, 1, 2),
            gradient.flatten(0, 2).sum(0) if ctx.has_bias else None,
            None,
        )


def _parts(count: int, grid: tuple[int, int], numbers: int) -> Iterator[slice]:
    """Split the images into parts that are small enough for intermediate values to stay in the cache.

    Args:
        count: number of images.
        grid: rows and columns of tiles in an image.
        numbers: size of a tile's largest intermediate value.
    """
    tiles = grid[0] * grid[1]
    at_once = max(1, _NUMBERS_AT_ONCE // (tiles * numbers), -(-_TILES_AT_ONCE // tiles))
    return (slice(start, start + at_once) for start in range(0, count, at_once))


def _padded(images: torch.Tensor) -> torch.Tensor:
    """Images with a border of zeros, as (batch, height + 2, width + 2, channels)."""
    count, channels, height, width = images.shape
    padded = images.new_empty(count, height + 2, width + 2, channels)
    padded[:, [0, -1]] = 0
    padded[:, :, [0, -1]] = 0
    padded[:, 1:-1, 1:-1] = images.permute(0, 2, 3, 1)
    return padded


def _transformed_weight(weight: torch.Tensor, transforms: _Transforms) -> torch.Tensor:
    """G g G' as (o, a a, c): one product for each output channel, which is fast with channels last in memory."""
    filters = weight.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.bmm(transforms.weight.expand(len(weight), *transforms.weight.shape), filters)


def _transformed_inputs(padded: torch.Tensor, grid: tuple[int, int], transforms: _Transforms) -> torch.Tensor:
    """B' d B of all tiles as (a a, k r s, c)."""
    side = transforms.tile + 2
    windows = _windows(padded, (side, side), grid, transforms.tile)
    inputs = transforms.inputs @ windows.reshape(side * side, -1)
    return inputs.view(side * side, -1, padded.shape[-1])


def _windows(padded: torch.Tensor, shape: tuple[int, int], grid: tuple[int, int], step: int) -> torch.Tensor:
    """A view of the windows of the given shape at every `step`-th position: (*shape, k, r, s, c)."""
    image, row, column, channel = padded.stride()
    return padded.as_strided(
        (*shape, len(padded), *grid, padded.shape[-1]), (row, column, image, step * row, step * column, channel)
    )


def _add_overlapping(padded: torch.Tensor, tiles: torch.Tensor, grid: tuple[int, int], tile: int) -> None:
    """Overwrite padded images with the sum of their tiles, each of which overlaps the next by two rows and columns."""
    side = tile + 2
    tiles = tiles.view(side, side, len(padded), *grid, padded.shape[-1])
    inner, outer = slice(0, tile), slice(tile, side)
    _windows(padded, (tile, tile), grid, tile).copy_(tiles[inner, inner])
    padded[:, -2:] = 0
    padded[:, :, -2:] = 0
    for rows, columns in ((inner, outer), (outer, inner), (outer, outer)):
        corner = padded[:, rows.start :, columns.start :]
        shape = rows.stop - rows.start, columns.stop - columns.start
        _windows(corner, shape, grid, tile).add_(tiles[rows, columns])

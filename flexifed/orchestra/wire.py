"""How tensors travel between actors: one flat buffer of bytes for each message, beside a small description of it.

Ray passes a NumPy array through its shared memory without copying it on arrival; torch tensors it pickles one by one.
Between processes on one GPU the buffer stays there, and only leave to read it travels (`orchestra.lending`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flexifed.core.aggregate import BlockSum, BlockSums, GroupState
from flexifed.federation.client import ClientRound
from flexifed.federation.host import HostRound

_ALIGNMENT = 64  # bytes; every tensor starts at a multiple of it, so that a view of its type is valid
Layout = tuple[tuple[torch.dtype, tuple[int, ...]], ...]


@dataclass(frozen=True)
class LentBuffer:
    """A buffer in another process, which stays and is written anew from round to round.

    Attributes:
        name: of this buffer and no other.
        handle: how to open it; None once its reader has had it.
    """

    name: str
    handle: bytes | None


@dataclass(frozen=True)
class PackedTensors:
    """Tensors, one after another in one buffer of bytes, which is here, or lent by another process."""

    buffer: NDArray[np.uint8] | LentBuffer
    layout: Layout


Pack = Callable[[Iterable[torch.Tensor]], PackedTensors]
Unpack = Callable[[PackedTensors], list[torch.Tensor]]


@dataclass(frozen=True)
class PackedGroups:
    """A `GroupState`: for each group's index its number of tensors, and the tensors."""

    groups: tuple[tuple[int, int], ...]
    tensors: PackedTensors


@dataclass(frozen=True)
class PackedBlock:
    """A `BlockSums`: its tensors by group, and each group's weight and whether it is applied already."""

    groups: PackedGroups
    weights: tuple[tuple[float, bool], ...]


@dataclass(frozen=True)
class PackedHostRound:
    """A `HostRound`."""

    clients: tuple[ClientRound, ...]
    blocks: dict[int, PackedBlock]


def pack_tensors(tensors: Iterable[torch.Tensor]) -> PackedTensors:
    """Copy tensors, from whatever device, into one buffer."""
    tensors = list(tensors)
    layout = layout_of(tensors)
    buffer = np.empty(num_bytes(layout), dtype=np.uint8)
    for tensor, view in zip(tensors, views(torch.from_numpy(buffer), layout), strict=True):
        view.copy_(tensor)
    return PackedTensors(buffer, layout)


def unpack_tensors(packed: PackedTensors) -> list[torch.Tensor]:
    """The tensors, as views into the buffer. It may lie in shared memory: never write to them."""
    assert not isinstance(packed.buffer, LentBuffer)
    with warnings.catch_warnings():
        # Buffers from Ray are read-only. Torch can't express that and warns; nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        buffer = torch.from_numpy(packed.buffer)
    return list(views(buffer, packed.layout))


def pack_groups(state: GroupState, pack: Pack = pack_tensors) -> PackedGroups:
    """Pack a global state."""
    groups = tuple((index, len(tensors)) for index, tensors in state.items())
    return PackedGroups(groups, pack(tensor for tensors in state.values() for tensor in tensors))


def unpack_groups(packed: PackedGroups, unpack: Unpack = unpack_tensors) -> GroupState:
    """Unpack a global state, as views."""
    tensors = iter(unpack(packed.tensors))
    return {index: tuple(next(tensors) for _ in range(count)) for index, count in packed.groups}


def pack_host_round(played: HostRound, pack: Callable[[int], Pack] = lambda block: pack_tensors) -> PackedHostRound:
    """Pack what a host hands back, each block by what `pack` says."""
    blocks = {
        number: PackedBlock(
            pack_groups({index: one.tensors for index, one in block.items()}, pack(number)),
            tuple((one.weight, one.weighted) for one in block.values()),
        )
        for number, block in played.blocks.items()
    }
    return PackedHostRound(played.clients, blocks)


def unpack_host_round(packed: PackedHostRound, unpack: Unpack = unpack_tensors) -> HostRound:
    """Unpack what a host handed back; tensors are views."""
    blocks = {number: _unpack_block(block, unpack) for number, block in packed.blocks.items()}
    return HostRound(packed.clients, blocks)


def _unpack_block(packed: PackedBlock, unpack: Unpack) -> BlockSums:
    groups = unpack_groups(packed.groups, unpack)
    return {
        index: BlockSum(tensors, weight, weighted)
        for (index, tensors), (weight, weighted) in zip(groups.items(), packed.weights, strict=True)
    }


def layout_of(tensors: Sequence[torch.Tensor]) -> Layout:
    """Types and shapes, which is all that a buffer does not say of what is in it."""
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)


def num_bytes(layout: Layout) -> int:
    """The size of a buffer for such tensors; at least 1, as torch refuses views into a buffer of no bytes."""
    *_, (start, size) = [(0, 1), *_places(layout)]
    return max(start + size, 1)


def views(buffer: torch.Tensor, layout: Layout) -> Iterator[torch.Tensor]:
    """The tensors in a buffer of bytes, contiguous, in order."""
    for (start, size), (dtype, shape) in zip(_places(layout), layout, strict=True):
        yield buffer[start : start + size].view(dtype).view(shape)


def _places(layout: Layout) -> Iterator[tuple[int, int]]:
    """Where each tensor begins in a buffer, and its size, in bytes."""
    end = 0
    for dtype, shape in layout:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        size = math.prod(shape) * dtype.itemsize
        yield start, size
        end = start + size

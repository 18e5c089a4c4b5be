"""How tensors travel between actors: one flat buffer of bytes for each message, beside a small description of it.

Ray passes a NumPy array through its shared memory without copying it on arrival; torch tensors it pickles one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flexifed.core.aggregate import BlockSum, BlockSums, GroupState
from flexifed.federation.client import ClientRound
from flexifed.federation.host import HostRound

_ALIGNMENT = 64  # bytes; every tensor starts at a multiple of it, so that a view of its type is valid


@dataclass(frozen=True)
class PackedTensors:
    """Tensors, one after another in one buffer of bytes."""

    buffer: NDArray[np.uint8]
    layout: tuple[tuple[torch.dtype, tuple[int, ...]], ...]


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
    layout = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
    starts, size = _starts(layout)
    buffer = np.empty(max(size, 1), dtype=np.uint8)  # torch refuses views into a buffer of no bytes
    for tensor, view in zip(tensors, _views(buffer, layout, starts), strict=True):
        view.copy_(tensor)
    return PackedTensors(buffer, layout)


def unpack_tensors(packed: PackedTensors) -> list[torch.Tensor]:
    """The tensors, as views into the buffer. It may lie in shared memory: never write to them."""
    starts, _ = _starts(packed.layout)
    return list(_views(packed.buffer, packed.layout, starts))


def pack_groups(state: GroupState) -> PackedGroups:
    """Pack a global state."""
    groups = tuple((index, len(tensors)) for index, tensors in state.items())
    return PackedGroups(groups, pack_tensors(tensor for tensors in state.values() for tensor in tensors))


def unpack_groups(packed: PackedGroups) -> GroupState:
    """Unpack a global state, as views."""
    tensors = iter(unpack_tensors(packed.tensors))
    return {index: tuple(next(tensors) for _ in range(count)) for index, count in packed.groups}


def pack_host_round(played: HostRound) -> PackedHostRound:
    """Pack what a host hands back."""
    blocks = {
        number: PackedBlock(
            pack_groups({index: one.tensors for index, one in block.items()}),
            tuple((one.weight, one.weighted) for one in block.values()),
        )
        for number, block in played.blocks.items()
    }
    return PackedHostRound(played.clients, blocks)


def unpack_host_round(packed: PackedHostRound) -> HostRound:
    """Unpack what a host handed back; tensors are views."""
    blocks = {number: _unpack_block(block) for number, block in packed.blocks.items()}
    return HostRound(packed.clients, blocks)


def _unpack_block(packed: PackedBlock) -> BlockSums:
    groups = unpack_groups(packed.groups)
    return {
        index: BlockSum(tensors, weight, weighted)
        for (index, tensors), (weight, weighted) in zip(groups.items(), packed.weights, strict=True)
    }


def _starts(layout: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> tuple[list[int], int]:
    """Where each tensor begins, and the size of all, in bytes."""
    starts, end = [], 0
    for dtype, shape in layout:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        starts.append(start)
        end = start + torch.Size(shape).numel() * dtype.itemsize
    return starts, end


def _views(
    buffer: NDArray[np.uint8], layout: Sequence[tuple[torch.dtype, tuple[int, ...]]], starts: Sequence[int]
) -> Iterator[torch.Tensor]:
    with warnings.catch_warnings():
        # Buffers from Ray are read-only. Torch can't express that and warns; nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        whole = torch.from_numpy(buffer)
    for start, (dtype, shape) in zip(starts, layout, strict=True):
        end = start + torch.Size(shape).numel() * dtype.itemsize
        yield whole[start:end].view(dtype).view(shape)

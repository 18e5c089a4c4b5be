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
    """A buffer in another process, which stays there and is written anew from round to round.

    Attributes:
        lender: the process's name for itself.
        generation: counts its buffers, each of which takes the place of the one before.
        handle: how to open it; None once its reader has had it.
    """

    lender: str
    generation: int
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
class PackedHostRound:
    """A `HostRound`.

    Attributes:
        clients: as there.
        blocks: for each block its number, and for each of its groups the index, the number of tensors, the weight, and
            whether it is applied already.
        tensors: of all blocks, in that order.
    """

    clients: tuple[ClientRound, ...]
    blocks: tuple[tuple[int, tuple[tuple[int, int, float, bool], ...]], ...]
    tensors: PackedTensors


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
    return {index: _take(tensors, count) for index, count in packed.groups}


def pack_host_round(played: HostRound, pack: Pack = pack_tensors) -> PackedHostRound:
    """Pack what a host hands back."""
    blocks = tuple(
        (number, tuple((index, len(one.tensors), one.weight, one.weighted) for index, one in block.items()))
        for number, block in played.blocks.items()
    )
    sums = (one for block in played.blocks.values() for one in block.values())
    return PackedHostRound(played.clients, blocks, pack(tensor for one in sums for tensor in one.tensors))


def unpack_host_round(packed: PackedHostRound, unpack: Unpack = unpack_tensors) -> HostRound:
    """Unpack what a host handed back; tensors are views."""
    tensors = iter(unpack(packed.tensors))
    blocks: dict[int, BlockSums] = {
        number: {index: BlockSum(_take(tensors, count), weight, weighted) for index, count, weight, weighted in groups}
        for number, groups in packed.blocks
    }
    return HostRound(packed.clients, blocks)


def _take(tensors: Iterator[torch.Tensor], count: int) -> tuple[torch.Tensor, ...]:
    return tuple(next(tensors) for _ in range(count))


def layout_of(tensors: Sequence[torch.Tensor]) -> Layout:
    """Types and shapes, which is all that a buffer does not say of what is in it."""
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)


def num_bytes(layout: Layout) -> int:
    """The size of a buffer for such tensors; at least 1, as torch refuses views into a buffer of no bytes."""
    return max(1, max((start + size for start, size in _places(layout)), default=0))


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

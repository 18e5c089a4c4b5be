"""How messages with tensors pass between actors: the tensors lie in one buffer of bytes, beside the pickled rest.

Ray maps a NumPy array from its shared memory without copying it, but pickles torch tensors one by one. Between
processes on one GPU the buffer stays on the GPU, and only a handle to it is sent (`orchestra.lending`).
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 64  # bytes; every tensor starts at a multiple of it, so that a view of its type is valid
Layout = tuple[tuple[torch.dtype, tuple[int, ...]], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class LentBuffer:
    """A buffer in another process, which stays there and is overwritten in every round.

    Attributes:
        lender: the name that the process has given itself.
        generation: counts the lender's buffers; each replaces the one before.
        handle: opens the buffer; None once the reader has received it.
    """

    lender: str
    generation: int
    handle: bytes | None


@dataclass(frozen=True)
class PackedTensors:
    """Tensors, one after another in one buffer of bytes, which is either here or lent by another process."""

    buffer: NDArray[np.uint8] | LentBuffer
    layout: Layout


class Transport(Protocol):
    """Passes tensors from process to process: `ObjectStore`, or `orchestra.lending.Lending` on one GPU."""

    def write(self, tensors: Sequence[torch.Tensor]) -> PackedTensors:
        """Copy tensors, from whatever device, into one buffer."""
        ...

    def for_reader(self, written: PackedTensors, reader: str) -> PackedTensors:
        """Return what to send to a reader, a process."""
        ...

    def read(self, packed: PackedTensors) -> list[torch.Tensor]:
        """Return the tensors as views into the buffer. Never write to them."""
        ...


class ObjectStore:
    """Passes the buffer itself, which Ray keeps in shared memory, from which any process can read it."""

    def write(self, tensors: Sequence[torch.Tensor]) -> PackedTensors:
        """See `Transport.write`."""
        layout = layout_of(tensors)
        buffer = np.empty(num_bytes(layout), dtype=np.uint8)
        for tensor, view in zip(tensors, views(torch.from_numpy(buffer), layout), strict=True):
            view.copy_(tensor)
        return PackedTensors(buffer, layout)

    def for_reader(self, written: PackedTensors, reader: str) -> PackedTensors:
        """See `Transport.for_reader`."""
        return written

    def read(self, packed: PackedTensors) -> list[torch.Tensor]:
        """See `Transport.read`."""
        assert not isinstance(packed.buffer, LentBuffer)
        with warnings.catch_warnings():
            # Buffers from Ray are read-only. Torch can't express that and warns; nothing here writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            buffer = torch.from_numpy(packed.buffer)
        return list(views(buffer, packed.layout))


@dataclass(frozen=True)
class Packed(Generic[T]):
    """A message of type T: its tensors, and everything else pickled, with each tensor replaced by its position."""

    pickled: bytes
    tensors: PackedTensors

    def for_reader(self, transport: Transport, reader: str) -> Packed[T]:
        """Return what to send to a reader, a process."""
        return replace(self, tensors=transport.for_reader(self.tensors, reader))


def pack(message: T, transport: Transport) -> Packed[T]:
    """Pack a message, which may hold tensors at any depth."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    return Packed(file.getvalue(), transport.write(pickler.tensors))


def unpack(packed: Packed[T], transport: Transport) -> T:
    """Unpack a message; its tensors are views. Never write to them."""
    message: T = _Unpickler(io.BytesIO(packed.pickled), transport.read(packed.tensors)).load()
    return message


class _Pickler(pickle.Pickler):
    """Collects a message's tensors instead of pickling them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Puts a message's tensors back."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self._tensors[pid]


def layout_of(tensors: Sequence[torch.Tensor]) -> Layout:
    """Return the types and shapes, which is all that a buffer does not say about its tensors."""
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)


def num_bytes(layout: Layout) -> int:
    """Return the size of a buffer for a layout; at least 1, as torch refuses views into a buffer of no bytes."""
    return max(1, max((start + size for start, size in _places(layout)), default=0))


def views(buffer: torch.Tensor, layout: Layout) -> Iterator[torch.Tensor]:
    """Yield the tensors in a buffer of bytes, contiguous, in order."""
    for (start, size), (dtype, shape) in zip(_places(layout), layout, strict=True):
        yield buffer[start : start + size].view(dtype).view(shape)


def _places(layout: Layout) -> Iterator[tuple[int, int]]:
    """Yield each tensor's offset in a buffer, and its size, in bytes."""
    end = 0
    for dtype, shape in layout:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        size = math.prod(shape) * dtype.itemsize
        yield start, size
        end = start + size

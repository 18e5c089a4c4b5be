"""Tensors that the processes of a cell leave on the GPU that they share, for each other to read.

CUDA lets a process open another's memory on the same GPU, and PyTorch hands out the leave to do so (CUDA IPC). Opening
takes longer than copying, so a buffer is made and lent once for a cell, and written anew in each round. No lock is
needed: a client's process writes while it plays, when the driver only waits, and the driver writes between rounds, when
no client plays. On CPUs the same works through shared memory; only tests ask for it.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from uuid import uuid4

import torch
import torch.multiprocessing  # teaches that pickler about tensors

from flexifed.orchestra.wire import Layout, LentBuffer, PackedTensors, layout_of, num_bytes, views


@dataclass(frozen=True)
class _Lent:
    name: str
    buffer: torch.Tensor
    layout: Layout


class Lender:
    """The buffers that a process lends.

    Args:
        device: they lie on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lent: dict[Hashable, _Lent] = {}
        self._has_handle: set[tuple[str, int]] = set()
        if device.type == "cpu":
            torch.multiprocessing.set_sharing_strategy("file_system")  # the other needs a common parent

    def pack(self, slot: Hashable, tensors: Iterable[torch.Tensor], reader: int = 0) -> PackedTensors:
        """`write` and `lend`."""
        self.write(slot, tensors)
        return self.lend(slot, reader)

    def write(self, slot: Hashable, tensors: Iterable[torch.Tensor]) -> None:
        """Copy tensors, from whatever device, into the buffer of a slot, and wait until they are there."""
        tensors = list(tensors)
        layout = layout_of(tensors)
        lent = self._lent.get(slot)
        if lent is None or lent.layout != layout:
            buffer = torch.empty(num_bytes(layout), dtype=torch.uint8, device=self._device)
            lent = self._lent[slot] = _Lent(uuid4().hex, buffer, layout)
        for tensor, view in zip(tensors, views(lent.buffer, layout), strict=True):
            view.copy_(tensor)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the reader's work does not wait for ours

    def lend(self, slot: Hashable, reader: int = 0) -> PackedTensors:
        """What a reader needs to know of a slot that was written. Each reader opens a buffer by a handle of its own."""
        lent = self._lent[slot]
        handle = None
        if (lent.name, reader) not in self._has_handle:
            self._has_handle.add((lent.name, reader))
            handle = bytes(ForkingPickler.dumps(lent.buffer))
        return PackedTensors(LentBuffer(lent.name, handle), lent.layout)


class Borrower:
    """The buffers that a process has been lent by others."""

    def __init__(self) -> None:
        self._opened: dict[str, torch.Tensor] = {}

    def unpack(self, packed: PackedTensors) -> list[torch.Tensor]:
        """The tensors, as views into the other's buffer. They change with its next round; never write to them."""
        lent = packed.buffer
        assert isinstance(lent, LentBuffer)
        if lent.name not in self._opened:
            assert lent.handle is not None
            self._opened[lent.name] = ForkingPickler.loads(lent.handle)
        return list(views(self._opened[lent.name], packed.layout))


@dataclass(frozen=True)
class Gpu:
    """The GPU that a process computes on.

    Attributes:
        node: that it is in.
        uuid: of the GPU.
        visible: `CUDA_VISIBLE_DEVICES` there, by which another process of the node gets to see the same.
    """

    node: str
    uuid: str
    visible: str

    @classmethod
    def here(cls, node: str) -> Gpu:
        """This process's."""
        uuid = str(torch.cuda.get_device_properties(0).uuid)
        return cls(node, uuid, os.environ.get("CUDA_VISIBLE_DEVICES", ""))

    def opened(self, node: str) -> torch.device | None:
        """The same GPU, as this process's first; None if it is elsewhere, or this process has others already."""
        if node != self.node:
            return None
        if not torch.cuda.is_initialized():
            os.environ["CUDA_VISIBLE_DEVICES"] = self.visible
        if not torch.cuda.is_available() or Gpu.here(node).uuid != self.uuid:
            return None
        return torch.device("cuda", 0)

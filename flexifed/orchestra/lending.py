"""Tensors that the processes of a cell leave on the GPU that they share, for each other to read.

CUDA lets a process open another's memory on the same GPU, and PyTorch hands out the leave to do so (CUDA IPC). Opening
takes longer than copying, so each process has one buffer, lends it once for a cell, and writes it anew in each round.
No lock is needed: a client's process writes while it plays, when the driver only waits, and the driver writes between
rounds, when no client plays. On CPUs the same works through shared memory; only tests ask for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from uuid import uuid4

import torch
import torch.multiprocessing  # teaches that pickler about tensors

from flexifed.orchestra.wire import LentBuffer, PackedTensors, layout_of, num_bytes, views

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_buffers: dict[torch.device, torch.Tensor] = {}
"""Of this process; see `_buffer`."""


class Lending:
    """One process's end: the buffer that it lends, and those that it has been lent.

    Args:
        device: they lie on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._name = ""
        self._lent: torch.Tensor | None = None
        self._readers: set[int] = set()
        self._opened: dict[str, torch.Tensor] = {}
        if device.type == "cpu":
            torch.multiprocessing.set_sharing_strategy("file_system")  # the other one needs a common parent

    def pack(self, tensors: Iterable[torch.Tensor]) -> PackedTensors:
        """`write` and `lend`, where there is one reader."""
        return self.lend(self.write(tensors), reader=0)

    def write(self, tensors: Iterable[torch.Tensor]) -> PackedTensors:
        """Copy tensors, from whatever device, into this process's buffer, and wait until they are there."""
        tensors = list(tensors)
        layout = layout_of(tensors)
        buffer = _buffer(self._device, num_bytes(layout))
        if buffer is not self._lent:
            self._name, self._lent, self._readers = uuid4().hex, buffer, set()
        for tensor, view in zip(tensors, views(buffer, layout), strict=True):
            view.copy_(tensor)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the reader's work does not wait for ours
        return PackedTensors(LentBuffer(self._name, None), layout)

    def lend(self, written: PackedTensors, reader: int) -> PackedTensors:
        """What to send to a reader, who opens the buffer once, by a handle of its own: PyTorch counts them."""
        if reader in self._readers:
            return written
        self._readers.add(reader)
        return replace(written, buffer=LentBuffer(self._name, bytes(ForkingPickler.dumps(self._lent))))

    def unpack(self, packed: PackedTensors) -> list[torch.Tensor]:
        """The tensors, as views into the other's buffer. They change with its next round; never write to them."""
        lent = packed.buffer
        assert isinstance(lent, LentBuffer)
        if lent.name not in self._opened:
            assert lent.handle is not None, "its reader has never had the handle"
            self._opened[lent.name] = ForkingPickler.loads(lent.handle)
        return list(views(self._opened[lent.name], packed.layout))


def _buffer(device: torch.device, size: int) -> torch.Tensor:
    """This process's buffer, a larger one if need be. It goes from cell to cell.

    PyTorch gives no memory back that a reader still has open, and a reader that was killed has it open for ever. One
    for each cell would fill the GPU, cell by lost cell.
    """
    held = _buffers.get(device)
    if held is None or held.numel() < size:
        _buffers.pop(device, None)
        del held
        held = _buffers[device] = torch.empty(size, dtype=torch.uint8, device=device)
    return held


def give_back() -> None:
    """Free what this process has lent, once its readers have closed it, and what it keeps on a GPU for later."""
    _buffers.clear()
    collect()


def collect() -> None:
    """Let others have the GPU's memory that nothing here needs any more."""
    if torch.cuda.is_initialized():
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Gpu:
    """The GPU that a process computes on.

    Attributes:
        node: that it is in.
        uuid: of the GPU.
        visible: `CUDA_VISIBLE_DEVICES` there, if it is set, by which another process of the node gets to see the same.
    """

    node: str
    uuid: str
    visible: str | None

    @classmethod
    def here(cls, node: str) -> Gpu:
        """This process's."""
        return cls(node, str(torch.cuda.get_device_properties(0).uuid), os.environ.get(_VISIBLE))

    def opened(self) -> torch.device:
        """The same GPU, as the first of this process, to which Ray may have given none.

        Raises:
            RuntimeError: this process computes on another already, or can't open it.
        """
        before = os.environ.get(_VISIBLE)
        if not torch.cuda.is_initialized():
            _set_visible(self.visible)
        try:
            if (here := Gpu.here(self.node).uuid) != self.uuid:
                raise RuntimeError(f"the driver's process has GPU {here}, its clients {self.uuid}")
        except BaseException:
            _set_visible(before)
            raise
        return torch.device("cuda", 0)


def _set_visible(devices: str | None) -> None:
    if devices is None:
        os.environ.pop(_VISIBLE, None)
    else:
        os.environ[_VISIBLE] = devices

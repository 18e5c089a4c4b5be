"""Tensors that the processes of a cell leave on the GPU that they share, for each other to read.

CUDA lets a process open another's memory on the same GPU, and PyTorch hands out the leave to do so (CUDA IPC). Opening
takes longer than copying, so each process has one buffer, lends it once for a cell, and writes it anew in each round.
No lock is needed: a client's process writes while it plays, when the driver only waits, and the driver writes between
rounds, when no client plays. On CPUs the same works through shared memory; only tests ask for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.reduction import ForkingPickler
from uuid import uuid4

import torch
import torch.multiprocessing  # teaches that pickler about tensors

from flexifed.orchestra.wire import LentBuffer, PackedTensors, layout_of, num_bytes, views

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Lending:
    """One process's end: the buffer that it lends, and those that it has been lent. A process has one: `lending_on`.

    PyTorch counts who has a buffer open, and never frees one whose reader was killed. So it is only given back when its
    readers have closed it, and serves the next ones otherwise. Should those need more room, it is lost until the
    process ends.

    Args:
        device: they lie on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._name = uuid4().hex
        self._generation = 0
        self._buffer: torch.Tensor | None = None
        self._readers: set[str] = set()
        self._opened: dict[str, tuple[int, torch.Tensor]] = {}
        if device.type == "cpu":
            torch.multiprocessing.set_sharing_strategy("file_system")  # the other one needs a common parent

    def write(self, tensors: Iterable[torch.Tensor]) -> PackedTensors:
        """Copy tensors, from whatever device, into this process's buffer, and wait until they are there."""
        tensors = list(tensors)
        layout = layout_of(tensors)
        for tensor, view in zip(tensors, views(self._roomy(num_bytes(layout)), layout), strict=True):
            view.copy_(tensor)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the reader's work does not wait for ours
        return PackedTensors(LentBuffer(self._name, self._generation, None), layout)

    def lend(self, written: PackedTensors, reader: str) -> PackedTensors:
        """What to send to a reader, a process. Each opens the buffer once, by a handle of its own."""
        if reader in self._readers:
            return written
        assert self._buffer is not None
        self._readers.add(reader)
        handle = bytes(ForkingPickler.dumps(self._buffer))
        return replace(written, buffer=LentBuffer(self._name, self._generation, handle))

    def unpack(self, packed: PackedTensors) -> list[torch.Tensor]:
        """The tensors, as views into the other's buffer. They change with its next round; never write to them."""
        lent = packed.buffer
        assert isinstance(lent, LentBuffer)
        generation, buffer = self._opened.get(lent.lender, (-1, None))
        if generation != lent.generation or buffer is None:
            assert lent.handle is not None, "its reader has never had the handle"
            self._opened.pop(lent.lender, None)
            buffer = ForkingPickler.loads(lent.handle)
            self._opened[lent.lender] = lent.generation, buffer
        return list(views(buffer, packed.layout))

    def close(self) -> None:
        """Close what others have lent."""
        self._opened.clear()
        collect()

    def give_back(self, *, closed: bool) -> None:
        """Forget the readers; free the buffer if they have all closed it, and keep it for the next ones otherwise."""
        self._readers.clear()
        if closed:
            self._buffer = None
        collect()

    def _roomy(self, size: int) -> torch.Tensor:
        """The buffer; a new one, which its readers have to open, if this one is too small."""
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None
            collect()  # so that it does not hold on to a larger block than it needs
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._generation += 1
            self._readers.clear()
        return self._buffer


@cache
def lending_on(device: torch.device) -> Lending:
    """This process's end on a device."""
    return Lending(device)


def sample() -> torch.Tensor:
    """What is lent to try whether it arrives."""
    return torch.arange(1000)


def is_sample(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether it did."""
    return torch.equal(tensors[0].cpu(), sample())


def collect() -> None:
    """Let others have the GPU's memory that nothing here needs any more."""
    if torch.cuda.is_initialized():
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def has_broken_gpu() -> bool:
    """Whether this process can't use its GPU any more. An error of CUDA's own stays until the process ends."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


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

        Nothing here may have asked CUDA for anything before, not even whether there is a GPU: it looks around once.

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

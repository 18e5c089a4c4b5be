"""Tensors that the processes of a cell leave on the GPU that they share, for each other to read.

CUDA lets a process open another's memory on the same GPU by a handle, which PyTorch makes (CUDA IPC). Opening takes
longer than copying, so each process has one buffer, lends it once per cell, and overwrites it in every round. No lock
is needed: a client's process writes while it plays a round, when the driver only waits, and the driver writes between
rounds, when no client plays. On CPUs the same works through shared memory, which only tests use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.reduction import ForkingPickler
from uuid import uuid4

import torch
import torch.multiprocessing  # registers tensors with ForkingPickler

from flexifed.orchestra.wire import LentBuffer, PackedTensors, layout_of, num_bytes, views

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Lending:
    """One process's end of a `Transport`: the buffer that it lends, and those that it borrows. See `lending_on`.

    PyTorch counts the processes that have a buffer open, and never frees one whose reader was killed. So the buffer is
    freed only once its readers have closed it, and is lent to the next ones otherwise. If those need a larger buffer,
    the memory of this one stays lost until the process ends.

    Args:
        device: where the buffers are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._name = uuid4().hex
        self._generation = 0
        self._buffer: torch.Tensor | None = None
        self._readers: set[str] = set()
        self._opened: dict[str, tuple[int, torch.Tensor]] = {}
        if device.type == "cpu":
            torch.multiprocessing.set_sharing_strategy("file_system")  # the default one needs a common parent process

    def write(self, tensors: Sequence[torch.Tensor]) -> PackedTensors:
        """Copy tensors, from whatever device, into this process's buffer, and wait until they are there."""
        layout = layout_of(tensors)
        for tensor, view in zip(tensors, views(self._buffer_of(num_bytes(layout)), layout), strict=True):
            view.copy_(tensor)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the reader's work does not wait for ours
        return PackedTensors(LentBuffer(self._name, self._generation, None), layout)

    def for_reader(self, written: PackedTensors, reader: str) -> PackedTensors:
        """Return what to send to a reader, a process. Each opens the buffer once, by a handle of its own."""
        if reader in self._readers:
            return written
        assert self._buffer is not None
        self._readers.add(reader)
        handle = bytes(ForkingPickler.dumps(self._buffer))
        return replace(written, buffer=LentBuffer(self._name, self._generation, handle))

    def read(self, packed: PackedTensors) -> list[torch.Tensor]:
        """Return the tensors as views into the lender's buffer, which it overwrites each round. Never write to them."""
        lent = packed.buffer
        assert isinstance(lent, LentBuffer)
        generation, buffer = self._opened.get(lent.lender, (-1, None))
        if generation != lent.generation or buffer is None:
            assert lent.handle is not None, "the reader has never received the handle"
            self._opened.pop(lent.lender, None)
            buffer = ForkingPickler.loads(lent.handle)
            self._opened[lent.lender] = lent.generation, buffer
        return list(views(buffer, packed.layout))

    def close(self) -> None:
        """Close the buffers that other processes have lent."""
        self._opened.clear()
        collect()

    def give_back(self, *, closed: bool) -> None:
        """Forget the readers. Free the buffer if they have all closed it; otherwise keep it for the next ones."""
        self._readers.clear()
        if closed:
            self._buffer = None
        collect()

    def _buffer_of(self, size: int) -> torch.Tensor:
        """Return a buffer of at least `size` bytes: the present one, or a new one, which readers have to open."""
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None
            collect()  # so that PyTorch does not reuse a larger block than needed
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._generation += 1
            self._readers.clear()
        return self._buffer


@cache
def lending_on(device: torch.device) -> Lending:
    """Return this process's only end on a device."""
    return Lending(device)


def sample() -> torch.Tensor:
    """Return a tensor that is sent to test whether lending works."""
    return torch.arange(1000)


def is_sample(tensor: torch.Tensor) -> bool:
    """Return whether the sample arrived intact."""
    return torch.equal(tensor.cpu(), sample())


def collect() -> None:
    """Release the GPU memory that this process no longer needs, so that others can have it."""
    if torch.cuda.is_initialized():
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def has_broken_gpu() -> bool:
    """Return whether this process can no longer use its GPU. CUDA's own errors persist until the process ends."""
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
        node: the Ray node that the GPU is in.
        uuid: the GPU's own name.
        visible: `CUDA_VISIBLE_DEVICES` of the process, if it is set, with which another process of the node sees the
            same GPU.
    """

    node: str
    uuid: str
    visible: str | None

    @classmethod
    def here(cls, node: str) -> Gpu:
        """Return the GPU of this process."""
        return cls(node, str(torch.cuda.get_device_properties(0).uuid), os.environ.get(_VISIBLE))

    def opened(self) -> torch.device:
        """Make this GPU the first of the current process, to which Ray may have given none.

        The process must not have called CUDA before, not even to ask whether there is a GPU: CUDA reads
        `CUDA_VISIBLE_DEVICES` only once.

        Raises:
            RuntimeError: this process already computes on another GPU, or can't open this one.
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

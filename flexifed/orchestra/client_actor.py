"""The Ray actor that hosts clients, and the error that it raises when its GPU is full."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import ray
import torch

from flexifed.config import CellConfig
from flexifed.core.aggregate import GroupState
from flexifed.data import DatasetInfo
from flexifed.errors import ClientError, DeviceMemoryError, ResourceError
from flexifed.federation.assignment import name_clients
from flexifed.federation.cell import ClientShards
from flexifed.federation.checkpoint import Checkpoint
from flexifed.federation.host import ClientHost, HostRound
from flexifed.orchestra.lending import Gpu, Lending, collect, is_sample, lending_on, sample
from flexifed.orchestra.wire import ObjectStore, Packed, Transport, pack, unpack
from flexifed.training.memory import keep_freed_memory

T = TypeVar("T")

_DRIVER = "driver"
# In the errors of PyTorch, cuBLAS and cuDNN; the last means that no plan of a convolution got the memory that it needs.
_DEVICE_IS_FULL = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")


class ClientActor:
    """A process that hosts clients of one cell after another, so that torch is imported once."""

    def __init__(self) -> None:
        keep_freed_memory()
        self._host: ClientHost | None = None
        self._clients: Sequence[int] = ()
        self._transport: Transport = ObjectStore()

    def begin(
        self,
        config: CellConfig,
        info: DatasetInfo,
        clients: Sequence[int],
        shards: Sequence[ClientShards],
        streams: int,
    ) -> None:
        """Forget the previous cell, and host these clients of a new one; see `ClientHost`."""
        self._host = None
        self._clients = clients
        if config.device == "cuda":
            if not torch.cuda.is_available():
                raise ResourceError(f"{name_clients(clients)} should run on a GPU, but their process sees none")
            collect()  # the previous cell's memory belongs to its streams
        with device_memory_explained(clients, "starting"):
            self._host = ClientHost(config, info, clients, shards, streams)

    def play_round(self, round_index: int, train: bool, *parts: Packed[GroupState]) -> Packed[HostRound]:
        """See `ClientHost.play_round`. The global state comes in parts, which Ray passes by reference."""
        with device_memory_explained(self._clients, f"round {round_index}"):
            played = self._hosted.play_round(round_index, self._joined(parts), train=train)
            return self._packed(played)

    def state_sha256(self, *parts: Packed[GroupState]) -> dict[int, str]:
        """See `ClientHost.state_sha256`."""
        with device_memory_explained(self._clients, "the digests of their states"):
            return self._hosted.state_sha256(self._joined(parts))

    def device_name(self) -> str:
        """See `ClientHost.device_name`; the machine's name is added."""
        return f"{self._hosted.device_name()} in {platform.node()}"

    def gpu(self) -> Gpu:
        """Return the GPU that the clients compute on."""
        return Gpu.here(ray.get_runtime_context().get_node_id())

    def lend_on(self, device: str) -> Packed[torch.Tensor]:
        """From now on leave tensors on a device that the driver shares, and read the driver's tensors there.

        Returns:
            A sample for the driver to read.
        """
        self._transport = lending_on(torch.device(device))
        return self._packed(sample())

    def can_read(self, packed: Packed[torch.Tensor]) -> bool:
        """Return whether the driver's sample arrives intact."""
        return is_sample(unpack(packed, self._transport))

    def stop_lending(self) -> None:
        """Send tensors through Ray from now on, and free the memory that was lent. The driver has closed it already."""
        if isinstance(self._transport, Lending):
            self._transport.close()
            self._transport.give_back(closed=True)
        self._transport = ObjectStore()

    def save(self, folder: Path) -> dict[str, str]:
        """See `ClientHost.save`."""
        with device_memory_explained(self._clients, "writing a checkpoint"):
            return self._hosted.save(folder)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `ClientHost.restore`."""
        with device_memory_explained(self._clients, "restoring a checkpoint"):
            self._hosted.restore(checkpoint)

    @property
    def _hosted(self) -> ClientHost:
        if self._host is None:
            raise RuntimeError("this actor holds no clients; call begin first")
        return self._host

    def _packed(self, message: T) -> Packed[T]:
        return pack(message, self._transport).for_reader(self._transport, _DRIVER)

    def _joined(self, parts: Sequence[Packed[GroupState]]) -> GroupState:
        """Join the parts of the global state."""
        return {index: tensors for part in parts for index, tensors in unpack(part, self._transport).items()}


@contextmanager
def device_memory_explained(clients: Sequence[int], doing: str) -> Iterator[None]:
    """Turn errors that a full device caused in a process with these clients into `DeviceMemoryError`."""
    try:
        yield
    except Exception as error:
        reason = full_device(error)
        if reason is None:
            raise
        if isinstance(error, ClientError):
            raise DeviceMemoryError(
                f"client {error.client}, round {error.round_index}, {error.stage}: {reason}"
            ) from error
        raise DeviceMemoryError(f"{name_clients(clients)}, {doing}: {reason}") from error


def full_device(error: BaseException) -> str | None:
    """Return what an error says about a full device; None if it had another cause."""
    shortage = next((cause for cause in _with_causes(error) if _is_device_full(cause)), None)
    return str(shortage).splitlines()[0].split(". ")[0] if shortage else None


def first_line(error: BaseException) -> str:
    """Return an error's message, without Ray's traceback and CUDA's advice."""
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: a CUDA graph's recording can fail because of an error within it."""
    error = getattr(error, "cause", None) or error  # without Ray's traceback
    while True:
        yield error
        if (before := error.__cause__ or error.__context__) is None:
            return
        error = before


def _is_device_full(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE_IS_FULL)

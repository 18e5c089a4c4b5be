"""A Ray actor that plays host to clients, and what it says when its GPU is full."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
import torch

from flexifed.config import CellConfig
from flexifed.core.aggregate import GroupState
from flexifed.data import DatasetInfo
from flexifed.errors import ClientError, DeviceMemoryError, ResourceError
from flexifed.federation.assignment import name_clients
from flexifed.federation.checkpoint import Checkpoint
from flexifed.federation.client import ClientShards
from flexifed.federation.host import ClientHost
from flexifed.orchestra.lending import Gpu, Lending, collect, is_sample, lending_on, sample
from flexifed.orchestra.wire import (
    PackedGroups,
    PackedHostRound,
    PackedTensors,
    pack_host_round,
    pack_tensors,
    unpack_groups,
    unpack_tensors,
)
from flexifed.training.memory import keep_freed_memory

_DRIVER = "driver"
# In what PyTorch says, and cuBLAS and cuDNN through it; the last, of a convolution none of whose plans got its memory.
_DEVICE_IS_FULL = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")


class ClientActor:
    """A process that plays host to clients of one cell after another, so that torch is imported once."""

    def __init__(self) -> None:
        keep_freed_memory()
        self._host: ClientHost | None = None
        self._clients: Sequence[int] = ()
        self._lending: Lending | None = None

    def begin(
        self,
        config: CellConfig,
        info: DatasetInfo,
        clients: Sequence[int],
        shards: Sequence[ClientShards],
        streams: int,
    ) -> None:
        """Forget the cell before, and hold these clients of this one; see `ClientHost`."""
        self._host = None
        self._clients = clients
        if config.device == "cuda":
            if not torch.cuda.is_available():
                raise ResourceError(f"{name_clients(clients)} were to run on a GPU, but their process sees none")
            collect()  # the memory of the cell before belongs to its streams
        with device_memory_explained(clients, "starting"):
            self._host = ClientHost(config, info, clients, shards, streams)

    def play_round(self, round_index: int, train: bool, aggregated: bool, *parts: PackedGroups) -> PackedHostRound:
        """See `ClientHost.play_round`; the global state comes in parts, which Ray hands over by reference."""
        with device_memory_explained(self._clients, f"round {round_index}"):
            played = self._hosted.play_round(round_index, self._joined(aggregated, parts), train=train)
            return pack_host_round(played, self._pack)

    def _pack(self, tensors: Iterable[torch.Tensor]) -> PackedTensors:
        return self._lending.lend(self._lending.write(tensors), _DRIVER) if self._lending else pack_tensors(tensors)

    def state_sha256(self, aggregated: bool, *parts: PackedGroups) -> dict[int, str]:
        """See `ClientHost.state_sha256`."""
        with device_memory_explained(self._clients, "the digests of their states"):
            return self._hosted.state_sha256(self._joined(aggregated, parts))

    def device_name(self) -> str:
        """See `ClientHost.device_name`; with the machine that it is in."""
        return f"{self._hosted.device_name()} in {platform.node()}"

    def gpu(self) -> Gpu:
        """The GPU that the clients compute on."""
        return Gpu.here(ray.get_runtime_context().get_node_id())

    def lend_on(self, device: str) -> PackedTensors:
        """From now on leave tensors on a device that the driver shares, and find the driver's there.

        Returns:
            A sample, for the driver to try.
        """
        self._lending = lending_on(torch.device(device))
        return self._pack([sample()])

    def can_read(self, packed: PackedTensors) -> bool:
        """Whether a sample of the driver's arrives."""
        assert self._lending is not None
        return is_sample(self._lending.unpack(packed))

    def stop_lending(self) -> None:
        """Send tensors by Ray from now on, and free the memory that was lent: the driver has closed it."""
        if self._lending:
            self._lending.close()
            self._lending.give_back(closed=True)
        self._lending = None

    def save(self, folder: Path) -> dict[str, str]:
        """See `ClientHost.save`."""
        with device_memory_explained(self._clients, "writing a checkpoint"):
            return self._hosted.save(folder)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `ClientHost.restore`."""
        with device_memory_explained(self._clients, "going on from a checkpoint"):
            self._hosted.restore(checkpoint)

    @property
    def _hosted(self) -> ClientHost:
        if self._host is None:
            raise RuntimeError("this actor holds no clients; call begin first")
        return self._host

    def _joined(self, aggregated: bool, parts: Sequence[PackedGroups]) -> GroupState | None:
        """The global state, from its parts; None before the first aggregation."""
        if not aggregated:
            return None
        unpack = self._lending.unpack if self._lending else unpack_tensors
        return {index: tensors for part in parts for index, tensors in unpack_groups(part, unpack).items()}


@contextmanager
def device_memory_explained(clients: Sequence[int], doing: str) -> Iterator[None]:
    """Tell a device that is full from whatever else goes wrong in a process with these clients."""
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
    """What an error says of a device that is full; None if it came of something else."""
    full = next((one for one in _with_causes(error) if _is_device_full(one)), None)
    return str(full).splitlines()[0].split(". ")[0] if full else None


def first_line(error: BaseException) -> str:
    """What an error says, without Ray's traceback and CUDA's advice."""
    said = str(getattr(error, "cause", None) or error).strip().splitlines()
    return said[0] if said else type(error).__name__


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and all that it came of: the end of a recording can fail because of what went wrong within it."""
    error = getattr(error, "cause", None) or error  # without Ray's traceback
    while True:
        yield error
        if (before := error.__cause__ or error.__context__) is None:
            return
        error = before


def _is_device_full(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE_IS_FULL)

"""Client actors, and the driver's hold on them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flexifed.config import CellConfig
from flexifed.core.aggregate import GroupState
from flexifed.data import DatasetInfo
from flexifed.errors import ClientError, DeviceMemoryError, FlexifedError, ResourceError
from flexifed.federation.assignment import name_clients
from flexifed.federation.checkpoint import Checkpoint
from flexifed.federation.client import ClientShards
from flexifed.federation.host import ClientHost, HostRound, cell_plan
from flexifed.orchestra.lending import Borrower, Gpu, Lender
from flexifed.orchestra.placement import CellPlacement
from flexifed.orchestra.wire import (
    Pack,
    PackedGroups,
    PackedHostRound,
    PackedTensors,
    Unpack,
    pack_groups,
    pack_host_round,
    pack_tensors,
    unpack_groups,
    unpack_host_round,
    unpack_tensors,
)
from flexifed.training.memory import keep_freed_memory
from flexifed.training.numerics import device_name

_LOOK_EVERY_S = 5.0
_SAMPLE = "sample"
# In what PyTorch says, and cuBLAS and cuDNN through it; the last, of a convolution none of whose plans got its memory.
_DEVICE_IS_FULL = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")


class LostError(Exception):
    """A process of a cell, or its node, is gone, and what it held with it."""


class GroupLostError(LostError):
    """Part of a cell's place in the cluster is gone, so that new processes have nowhere to start."""


class ClientActor:
    """A process that plays host to clients of one cell after another, so that torch is imported once."""

    def __init__(self) -> None:
        keep_freed_memory()
        self._host: ClientHost | None = None
        self._clients: Sequence[int] = ()
        self._lender: Lender | None = None
        self._unpack: Unpack = unpack_tensors

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
        self.lend_on(None)
        if config.device == "cuda":
            if not torch.cuda.is_available():
                raise ResourceError(f"{name_clients(clients)} were to run on a GPU, but their process sees none")
            torch.cuda.empty_cache()  # the memory of the cell before belongs to its streams
        with _device_memory_explained(clients):
            self._host = ClientHost(config, info, clients, shards, streams)

    def play_round(self, round_index: int, train: bool, aggregated: bool, *parts: PackedGroups) -> PackedHostRound:
        """See `ClientHost.play_round`; the global state comes in parts, which Ray hands over by reference."""
        with _device_memory_explained(self._clients):
            shared = _joined(aggregated, parts, self._unpack)
            return pack_host_round(self._hosted.play_round(round_index, shared, train=train), self._pack)

    def _pack(self, block: int) -> Pack:
        return partial(self._lender.pack, block) if self._lender else pack_tensors

    def gpu(self) -> Gpu:
        """The GPU that the clients compute on."""
        return Gpu.here(ray.get_runtime_context().get_node_id())

    def lend_on(self, device: str | None) -> PackedTensors | None:
        """From now on leave tensors on a device that the driver shares, and get them there; None: through Ray.

        Returns:
            A sample, for the driver to try.
        """
        if device is None:
            self._lender, self._unpack = None, unpack_tensors
            return None
        self._lender, self._unpack = Lender(torch.device(device)), Borrower().unpack
        return self._lender.pack(_SAMPLE, [_sample()])

    def can_read(self, packed: PackedTensors) -> bool:
        """Whether a sample of the driver's arrives."""
        return _is_sample(self._unpack(packed))

    def state_sha256(self, aggregated: bool, *parts: PackedGroups) -> dict[int, str]:
        """See `ClientHost.state_sha256`."""
        return self._hosted.state_sha256(_joined(aggregated, parts, self._unpack))

    def device_name(self) -> str:
        """See `ClientHost.device_name`; with the machine that it is in."""
        return f"{self._hosted.device_name()} in {platform.node()}"

    def save(self, folder: Path) -> dict[str, str]:
        """See `ClientHost.save`."""
        return self._hosted.save(folder)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `ClientHost.restore`."""
        with _device_memory_explained(self._clients):
            self._hosted.restore(checkpoint)

    @property
    def _hosted(self) -> ClientHost:
        if self._host is None:
            raise RuntimeError("this actor holds no clients; call begin first")
        return self._host


class ActorHosts:
    """The client actors of a placement group, which play rounds at the same time.

    Nothing is tried again here: Ray would give the call to a new process, which knows nothing of its clients.

    Args:
        group: each of its bundles gets one actor.

    Attributes:
        exchange: how tensors get from process to process, in words.

    Raises:
        LostError: from every method, when a process is gone: GroupLostError, if its node is gone with it. The others
            can't be told where it was, so they are ended too.
    """

    def __init__(self, group: PlacementGroup) -> None:
        self._group = group
        self._lender: Lender | None = None
        self._unpack: Unpack = unpack_tensors
        self._actors: list[Any] = [  # Ray's handles are not typed by method
            ray.remote(ClientActor)
            .options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            )
            .remote()
            for index, bundle in enumerate(group.bundle_specs)
        ]

    def begin(
        self, config: CellConfig, info: DatasetInfo, placement: CellPlacement, shards: Sequence[ClientShards]
    ) -> None:
        """Give the actors a cell's clients.

        Raises:
            GroupLostError: actors that were not started yet have lost their node.
        """
        self.clients = placement.clients
        self._plan = cell_plan(config, info)
        self._architectures = [
            {self._plan.architecture_of[client] for client in clients} for clients in placement.clients
        ]
        begun = [
            actor.begin.remote(config, info, clients, [shards[client] for client in clients], placement.streams)
            for actor, clients in zip(self._actors, placement.clients, strict=True)
        ]
        while len(ray.wait(begun, num_returns=len(begun), timeout=_LOOK_EVERY_S)[0]) < len(begun):
            if not self.has_place():
                raise GroupLostError("a node is gone before all processes were started")
        self._get(begun)
        self._choose_exchange(config, placement)

    def _choose_exchange(self, config: CellConfig, placement: CellPlacement) -> None:
        """Leave tensors on the GPU if it is the same for all, and if that works. It changes no number."""
        self._lender, self._unpack = None, unpack_tensors
        self.exchange = "tensors travel through Ray's object store"
        if len(self._actors) == 1 or not self._plan.groups or not placement.cuda_ipc:
            return
        device = self._common_device(config)
        if device is None:
            return
        try:
            self._lend_on(device)
        except LostError:
            raise
        except Exception as error:  # whatever a system has against it
            self._lender, self._unpack = None, unpack_tensors
            self._get([actor.lend_on.remote(None) for actor in self._actors])
            self.exchange += f", as they can't stay on {device_name(device)}: {str(error).strip().splitlines()[-1]}"
        else:
            self.exchange = f"tensors stay on {device_name(device)}"

    def _common_device(self, config: CellConfig) -> torch.device | None:
        """The GPU of all actors, opened by this process; None where they have several, or it is another node's."""
        if config.device != "cuda":
            return None
        gpus = set(self._get([actor.gpu.remote() for actor in self._actors]))
        return gpus.pop().opened(ray.get_runtime_context().get_node_id()) if len(gpus) == 1 else None

    def _lend_on(self, device: torch.device) -> None:
        """Begin to lend and borrow, and try it both ways."""
        lender, borrower = Lender(device), Borrower()
        samples = self._get([actor.lend_on.remote(str(device)) for actor in self._actors])
        lender.write(_SAMPLE, [_sample()])
        arrived = self._get(
            [actor.can_read.remote(lender.lend(_SAMPLE, reader)) for reader, actor in enumerate(self._actors)]
        )
        if not all(arrived) or not all(_is_sample(borrower.unpack(packed)) for packed in samples):
            raise RuntimeError("other values arrived than were sent")
        self._lender, self._unpack = lender, borrower.unpack

    def has_place(self) -> bool:
        """Whether the placement group is whole. One that lost a node may wait for a new one without end."""
        return bool(placement_group_table(self._group)["state"] == "CREATED")

    def play_round(self, round_index: int, shared: GroupState | None, *, train: bool) -> Sequence[HostRound]:
        """Let all clients play a round; results in the order of the actors, whoever finishes first."""
        aggregated = shared is not None
        played = self._get(
            [
                actor.play_round.remote(round_index, train, aggregated, *parts)
                for actor, parts in zip(self._actors, self._parts(shared), strict=True)
            ]
        )
        return [unpack_host_round(one, self._unpack) for one in played]

    def state_sha256(self, shared: GroupState | None) -> dict[int, str]:
        """The digest of what each client holds, by client."""
        aggregated = shared is not None
        digests = self._get(
            [
                actor.state_sha256.remote(aggregated, *parts)
                for actor, parts in zip(self._actors, self._parts(shared), strict=True)
            ]
        )
        return {client: digest for part in digests for client, digest in part.items()}

    def device_names(self) -> list[str]:
        """What each process computes on."""
        return self._get([actor.device_name.remote() for actor in self._actors])

    def save(self, folder: Path) -> dict[str, str]:
        """Let each process write what its clients keep; returns the files' names and digests."""
        written = self._get([actor.save.remote(folder) for actor in self._actors])
        return {name: digest for part in written for name, digest in part.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Let all clients go on from a checkpoint."""
        self._get([actor.restore.remote(checkpoint) for actor in self._actors])

    def _parts(self, shared: GroupState | None) -> list[list[Any]]:
        """For each actor, the groups of its clients and no others.

        Groups over the same architectures are sent as one: an object, shared by all actors of a node, or a buffer.
        """
        by_members: dict[tuple[int, ...], GroupState] = {}
        for index, tensors in (shared or {}).items():
            by_members.setdefault(self._plan.groups[index].architectures, {})[index] = tensors
        sendable = {members: self._sendable(members, part) for members, part in by_members.items()}
        return [
            [part(actor) for members, part in sendable.items() if not held.isdisjoint(members)]
            for actor, held in enumerate(self._architectures)
        ]

    def _sendable(self, members: tuple[int, ...], groups: GroupState) -> Callable[[int], Any]:
        """What to send of some groups, by actor: a reference to one object, or leave to read them on the GPU."""
        lender = self._lender
        if lender is None:
            reference = ray.put(pack_groups(groups))
            return lambda actor: reference
        lender.write(members, (tensor for tensors in groups.values() for tensor in tensors))
        return lambda actor: pack_groups(groups, lambda _: lender.lend(members, actor))

    def _get(self, references: list[Any]) -> list[Any]:
        """Wait for all, or for the first that fails. An error of ours comes out as it was raised."""
        try:
            return ray.get(references)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FlexifedError):
                raise error.cause from error
            if isinstance(error.cause, ray.exceptions.RayError):
                raise self._loss(error.cause) from error
            raise
        except ray.exceptions.RayError as error:
            raise self._loss(error) from error

    def _loss(self, error: ray.exceptions.RayError) -> LostError:
        """Which clients' process is lost, where Ray says so, and its reason."""
        names = {actor._actor_id.hex(): clients for actor, clients in zip(self._actors, self.clients, strict=True)}
        clients = names.get(getattr(error, "actor_id", None))
        process = f"the process of {name_clients(clients)}" if clients else "a process"
        reason = f"{process} is gone: {str(error).strip().splitlines()[-1]}"
        # A node whose death is not confirmed yet makes its actors unavailable; a process alone that dies is known dead.
        unsure = isinstance(error, ray.exceptions.ActorUnavailableError)
        return GroupLostError(reason) if unsure or not self.has_place() else LostError(reason)

    def shut_down(self) -> None:
        """End the actors' processes."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


def _joined(aggregated: bool, parts: Sequence[PackedGroups], unpack: Unpack) -> GroupState | None:
    """The global state, from its parts; None before the first aggregation."""
    if not aggregated:
        return None
    return {index: tensors for part in parts for index, tensors in unpack_groups(part, unpack).items()}


def _sample() -> torch.Tensor:
    """What is sent to try whether it arrives."""
    return torch.arange(1000)


def _is_sample(tensors: Sequence[torch.Tensor]) -> bool:
    return torch.equal(tensors[0].cpu(), _sample())


@contextmanager
def _device_memory_explained(clients: Sequence[int]) -> Iterator[None]:
    """Tell a device that is full from whatever else goes wrong in a process with these clients."""
    try:
        yield
    except Exception as error:
        cause = next((one for one in _with_causes(error) if _is_device_full(one)), None)
        if cause is None:
            raise
        reason = str(cause).splitlines()[0].split(". ")[0]
        if isinstance(error, ClientError):
            raise DeviceMemoryError(
                f"client {error.client}, round {error.round_index}, {error.stage}: {reason}"
            ) from error
        raise DeviceMemoryError(f"{name_clients(clients)}, starting: {reason}") from error


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and all that it came of: the end of a recording can fail because of what went wrong within it."""
    while True:
        yield error
        if (before := error.__cause__ or error.__context__) is None:
            return
        error = before


def _is_device_full(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE_IS_FULL)

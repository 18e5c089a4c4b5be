"""The client actors of a cell, as its driver sees them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flexifed.config import CellConfig
from flexifed.core.aggregate import GroupState
from flexifed.data import DatasetInfo
from flexifed.errors import FlexifedError
from flexifed.federation.assignment import name_clients
from flexifed.federation.cell import ClientShards, cell_plan
from flexifed.federation.checkpoint import Checkpoint
from flexifed.federation.host import HostRound
from flexifed.orchestra.client_actor import ClientActor, first_line
from flexifed.orchestra.lending import Lending, collect, is_sample, lending_on, sample
from flexifed.orchestra.placement import CellPlacement
from flexifed.orchestra.wire import ObjectStore, Packed, Transport, pack, unpack
from flexifed.training.numerics import device_name

T = TypeVar("T")

_LOOK_EVERY_S = 5.0
_STOP_LENDING_S = 2.0


class LostError(Exception):
    """A process of a cell, or its node, is gone, and with it the state that it held."""


class GroupLostError(LostError):
    """Part of a cell's placement group is gone, so that new processes have nowhere to start."""


class ActorHosts:
    """The client actors of a placement group, which play rounds at the same time.

    Failed calls are not retried here: Ray would give the call to a new process, which knows nothing of its clients.

    Args:
        group: each of its bundles gets one actor.

    Attributes:
        exchange: how tensors pass between processes, in words.

    Raises:
        LostError: from every method, when a process is gone; GroupLostError, if its node is gone too. The remaining
            processes can't be told how far the lost one got, so they have to be ended as well.
    """

    def __init__(self, group: PlacementGroup) -> None:
        self._group = group
        self._transport: Transport = ObjectStore()
        self.exchange = "no cell has begun"
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
            GroupLostError: the node of actors that had not started yet is gone.
        """
        self._stop_lending()
        collect()  # what the previous cell has left on a GPU
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
                raise GroupLostError("a node was lost before all processes had started")
        self._get(begun)
        self._choose_exchange(config, placement)

    def _choose_exchange(self, config: CellConfig, placement: CellPlacement) -> None:
        """Leave tensors on the GPU if all actors share one and a test succeeds. It changes no number."""
        if not self._plan.groups_across(placement.clients):
            self.exchange = "no tensors pass between processes"
            return
        self.exchange = "tensors travel through Ray's object store"
        if config.device != "cuda" or not placement.cuda_ipc:
            return
        try:
            device = self._common_gpu()
            self._lend_on(device)
            self.exchange = f"tensors stay on {device_name(device)}"
            return
        except LostError:
            raise
        except Exception as error:  # systems refuse in many ways
            self.exchange += f", and don't stay on a GPU: {first_line(error)}"
        self._stop_lending()  # after the handler, because the error's frames hold tensors

    def _common_gpu(self) -> torch.device:
        """Open the GPU that all actors compute on in this process.

        Raises:
            RuntimeError: there are several, or it belongs to another node, or it can't be opened.
        """
        gpus = set(self._get([actor.gpu.remote() for actor in self._actors]))
        if len(gpus) > 1:
            raise RuntimeError(f"the clients are on {len(gpus)} GPUs")
        gpu = gpus.pop()
        if gpu.node != ray.get_runtime_context().get_node_id():
            raise RuntimeError("the clients are on another node than the driver")
        return gpu.opened()

    def _lend_on(self, device: torch.device) -> None:
        """Begin to lend and to borrow, and test both directions."""
        self._transport = lending_on(device)
        samples = self._get([actor.lend_on.remote(str(device)) for actor in self._actors])
        arrived = self._get(
            [actor.can_read.remote(packed) for actor, packed in zip(self._actors, self._lent(sample()), strict=True)]
        )
        if not all(arrived) or not all(is_sample(unpack(packed, self._transport)) for packed in samples):
            raise RuntimeError("the values that arrived are not those that were sent")

    def _lent(self, message: T) -> list[Packed[T]]:
        """Pack a message into the buffer that this process lends; returns what to send to each actor."""
        packed = pack(message, self._transport)
        return [packed.for_reader(self._transport, actor._actor_id.hex()) for actor in self._actors]

    def _stop_lending(self) -> None:
        """Close the lent buffers on both sides. An actor that does not answer keeps ours open, so it is not freed."""
        if not isinstance(self._transport, Lending):
            return
        self._transport.close()
        stopping = [actor.stop_lending.remote() for actor in self._actors]
        stopped, busy = ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_LENDING_S)
        self._transport.give_back(closed=not busy and all(map(_succeeded, stopped)))
        self._transport = ObjectStore()

    def has_place(self) -> bool:
        """Return whether the placement group is whole. One that lost a node may wait for a new one for ever."""
        return bool(placement_group_table(self._group)["state"] == "CREATED")

    def play_round(self, round_index: int, shared: GroupState, *, train: bool) -> Sequence[HostRound]:
        """Let all clients play a round; results come in the order of the actors, whichever finishes first."""
        played = self._get(
            [
                actor.play_round.remote(round_index, train, *parts)
                for actor, parts in zip(self._actors, self._parts(shared), strict=True)
            ]
        )
        return [unpack(packed, self._transport) for packed in played]

    def state_sha256(self, shared: GroupState) -> dict[int, str]:
        """Return the digest of each client's state, by client."""
        digests = self._get(
            [actor.state_sha256.remote(*parts) for actor, parts in zip(self._actors, self._parts(shared), strict=True)]
        )
        return {client: digest for part in digests for client, digest in part.items()}

    def device_names(self) -> list[str]:
        """Return the device that each process computes on."""
        return self._get([actor.device_name.remote() for actor in self._actors])

    def save(self, folder: Path) -> dict[str, str]:
        """Let each process write its clients' personal state; returns the files' names and digests."""
        written = self._get([actor.save.remote(folder) for actor in self._actors])
        return {name: digest for part in written for name, digest in part.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Let all clients resume from a checkpoint."""
        self._get([actor.restore.remote(checkpoint) for actor in self._actors])

    def _parts(self, shared: GroupState) -> list[list[Any]]:
        """Pack the global state for each actor: only its clients' groups, or, on a common GPU, all groups.

        Groups over the same architectures travel as one object, put once and shared by all actors of a node.
        """
        if not shared:
            return [[] for _ in self._actors]
        if isinstance(self._transport, Lending):
            return [[packed] for packed in self._lent(shared)]
        by_members: dict[tuple[int, ...], GroupState] = {}
        for index, tensors in shared.items():
            by_members.setdefault(self._plan.groups[index].architectures, {})[index] = tensors
        stored = {members: ray.put(pack(part, self._transport)) for members, part in by_members.items()}
        return [
            [reference for members, reference in stored.items() if not architectures.isdisjoint(members)]
            for architectures in self._architectures
        ]

    def _get(self, references: list[Any]) -> list[Any]:
        """Wait for all results, or for the first failure. A `FlexifedError` is raised as it was in the actor."""
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
        """Return the error to raise: which clients' process is lost, if Ray says so, and Ray's reason."""
        by_actor = {actor._actor_id.hex(): clients for actor, clients in zip(self._actors, self.clients, strict=True)}
        clients = by_actor.get(getattr(error, "actor_id", None))
        process = f"the process of {name_clients(clients)}" if clients else "a process"
        reason = f"{process} is gone: {str(error).strip().splitlines()[-1]}"
        # Actors are unavailable while the death of their node is unconfirmed; the death of a process alone is known.
        is_node_suspect = isinstance(error, ray.exceptions.ActorUnavailableError)
        return GroupLostError(reason) if is_node_suspect or not self.has_place() else LostError(reason)

    def shut_down(self) -> None:
        """End the actors' processes."""
        with suppress(RuntimeError):  # from a broken GPU
            self._stop_lending()
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


def _succeeded(reference: Any) -> bool:
    try:
        ray.get(reference)
    except ray.exceptions.RayError:
        return False
    return True

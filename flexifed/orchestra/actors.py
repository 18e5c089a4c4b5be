"""The driver's hold on its client actors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flexifed.config import CellConfig
from flexifed.core.aggregate import GroupState
from flexifed.data import DatasetInfo
from flexifed.errors import FlexifedError
from flexifed.federation.assignment import name_clients
from flexifed.federation.checkpoint import Checkpoint
from flexifed.federation.client import ClientShards
from flexifed.federation.host import HostRound, cell_plan
from flexifed.orchestra.client_actor import ClientActor, first_line
from flexifed.orchestra.lending import Lending, collect, is_sample, lending_on, sample
from flexifed.orchestra.placement import CellPlacement
from flexifed.orchestra.wire import pack_groups, unpack_host_round, unpack_tensors
from flexifed.training.numerics import device_name

_LOOK_EVERY_S = 5.0
_STOP_LENDING_S = 2.0


class LostError(Exception):
    """A process of a cell, or its node, is gone, and what it held with it."""


class GroupLostError(LostError):
    """Part of a cell's place in the cluster is gone, so that new processes have nowhere to start."""


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
        self._lending: Lending | None = None
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
            GroupLostError: actors that were not started yet have lost their node.
        """
        self._stop_lending()
        collect()  # what the cell before has left on a GPU
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
        except Exception as error:  # whatever a system has against it
            self.exchange += f", and don't stay on a GPU: {first_line(error)}"
        self._stop_lending()  # past the handler, as the error's frames hold tensors

    def _common_gpu(self) -> torch.device:
        """The GPU of all actors, opened by this process.

        Raises:
            RuntimeError: they have several, or it is another node's, or can't be opened.
        """
        gpus = set(self._get([actor.gpu.remote() for actor in self._actors]))
        if len(gpus) > 1:
            raise RuntimeError(f"the clients are on {len(gpus)} of them")
        gpu = gpus.pop()
        if gpu.node != ray.get_runtime_context().get_node_id():
            raise RuntimeError("the clients are on another node than the driver")
        return gpu.opened()

    def _lend_on(self, device: torch.device) -> None:
        """Begin to lend and to borrow, and try it both ways."""
        self._lending = lending_on(device)
        samples = self._get([actor.lend_on.remote(str(device)) for actor in self._actors])
        mine = self._lending.write([sample()])
        arrived = self._get(
            [actor.can_read.remote(self._lending.lend(mine, actor._actor_id.hex())) for actor in self._actors]
        )
        if not all(arrived) or not all(is_sample(self._lending.unpack(packed)) for packed in samples):
            raise RuntimeError("other values arrived than were sent")

    def _stop_lending(self) -> None:
        """Close what was lent, here and there. Who does not answer has it open for ever, so the buffer stays, too."""
        if self._lending is None:
            return
        self._lending.close()
        stopping = [actor.stop_lending.remote() for actor in self._actors]
        stopped, busy = ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_LENDING_S)
        self._lending.give_back(closed=not busy and all(map(_succeeded, stopped)))
        self._lending = None

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
        return [unpack_host_round(one, self._lending.unpack if self._lending else unpack_tensors) for one in played]

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
        """For each actor, the groups of its clients and no others, or leave to read all of them on the GPU.

        Groups over the same architectures travel as one object, put once and shared by all actors of a node.
        """
        if shared is None:
            return [[] for _ in self._actors]
        if self._lending:
            written = pack_groups(shared, self._lending.write)
            return [
                [replace(written, tensors=self._lending.lend(written.tensors, actor._actor_id.hex()))]
                for actor in self._actors
            ]
        by_members: dict[tuple[int, ...], GroupState] = {}
        for index, tensors in shared.items():
            by_members.setdefault(self._plan.groups[index].architectures, {})[index] = tensors
        stored = {members: ray.put(pack_groups(part)) for members, part in by_members.items()}
        return [
            [reference for members, reference in stored.items() if not held.isdisjoint(members)]
            for held in self._architectures
        ]

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
        with suppress(RuntimeError):  # of a GPU that is broken
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

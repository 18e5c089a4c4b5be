"""Client actors, and the driver's hold on them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flexifed.config import CellConfig
from flexifed.core.aggregate import GroupState
from flexifed.data import DatasetInfo
from flexifed.errors import FlexifedError, ResourceError
from flexifed.federation.checkpoint import Checkpoint
from flexifed.federation.client import ClientShards
from flexifed.federation.host import ClientHost, HostRound, cell_plan
from flexifed.orchestra.placement import CellPlacement
from flexifed.orchestra.wire import (
    PackedGroups,
    PackedHostRound,
    pack_groups,
    pack_host_round,
    unpack_groups,
    unpack_host_round,
)


class ClientActor:
    """A process that plays host to clients of one cell after another, so that torch is imported once."""

    def __init__(self) -> None:
        self._host: ClientHost | None = None

    def begin(
        self, config: CellConfig, info: DatasetInfo, clients: Sequence[int], shards: Sequence[ClientShards]
    ) -> None:
        """Forget the cell before, and hold these clients of this one."""
        self._host = None
        if config.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise ResourceError(f"clients {list(clients)} were to run on a GPU, but their process sees none")
        self._host = ClientHost(config, info, clients, shards)

    def play_round(self, round_index: int, train: bool, aggregated: bool, *parts: PackedGroups) -> PackedHostRound:
        """See `ClientHost.play_round`; the global state comes in parts, which Ray hands over by reference."""
        return pack_host_round(self._hosted.play_round(round_index, _joined(aggregated, parts), train=train))

    def state_sha256(self, aggregated: bool, *parts: PackedGroups) -> dict[int, str]:
        """See `ClientHost.state_sha256`."""
        return self._hosted.state_sha256(_joined(aggregated, parts))

    def device_name(self) -> str:
        """See `ClientHost.device_name`; with the machine that it is in."""
        return f"{self._hosted.device_name()} in {platform.node()}"

    def save(self, folder: Path) -> dict[str, str]:
        """See `ClientHost.save`."""
        return self._hosted.save(folder)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `ClientHost.restore`."""
        self._hosted.restore(checkpoint)

    @property
    def _hosted(self) -> ClientHost:
        if self._host is None:
            raise RuntimeError("this actor holds no clients; call begin first")
        return self._host


class ActorHosts:
    """The client actors of a placement group, which play rounds at the same time.

    Args:
        group: each of its bundles gets one actor.
    """

    def __init__(self, group: PlacementGroup) -> None:
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
        """Give the actors a cell's clients."""
        self._plan = cell_plan(config, info)
        self._architectures = [
            {self._plan.architecture_of[client] for client in clients} for clients in placement.clients
        ]
        _get(
            [
                actor.begin.remote(config, info, clients, shards[clients.start : clients.stop])
                for actor, clients in zip(self._actors, placement.clients, strict=True)
            ]
        )

    def play_round(self, round_index: int, shared: GroupState | None, *, train: bool) -> Sequence[HostRound]:
        """Let all clients play a round; results in client order, whoever finishes first."""
        aggregated = shared is not None
        played = _get(
            [
                actor.play_round.remote(round_index, train, aggregated, *parts)
                for actor, parts in zip(self._actors, self._parts(shared), strict=True)
            ]
        )
        return [unpack_host_round(one) for one in played]

    def state_sha256(self, shared: GroupState | None) -> dict[int, str]:
        """The digest of what each client holds, by client."""
        aggregated = shared is not None
        digests = _get(
            [
                actor.state_sha256.remote(aggregated, *parts)
                for actor, parts in zip(self._actors, self._parts(shared), strict=True)
            ]
        )
        return {client: digest for part in digests for client, digest in part.items()}

    def device_names(self) -> list[str]:
        """What each process computes on."""
        return _get([actor.device_name.remote() for actor in self._actors])

    def save(self, folder: Path) -> dict[str, str]:
        """Let each process write what its clients keep; returns the files' names and digests."""
        written = _get([actor.save.remote(folder) for actor in self._actors])
        return {name: digest for part in written for name, digest in part.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Let all clients go on from a checkpoint."""
        _get([actor.restore.remote(checkpoint) for actor in self._actors])

    def _parts(self, shared: GroupState | None) -> list[list[Any]]:
        """For each actor, references to the groups of its clients and to no others.

        Groups over the same architectures travel as one object, put once and shared by all actors of a node.
        """
        by_members: dict[tuple[int, ...], GroupState] = {}
        for index, tensors in (shared or {}).items():
            by_members.setdefault(self._plan.groups[index].architectures, {})[index] = tensors
        stored = {members: ray.put(pack_groups(part)) for members, part in by_members.items()}
        return [
            [reference for members, reference in stored.items() if not held.isdisjoint(members)]
            for held in self._architectures
        ]

    def shut_down(self) -> None:
        """End the actors' processes."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


def _joined(aggregated: bool, parts: Sequence[PackedGroups]) -> GroupState | None:
    """The global state, from its parts; None before the first aggregation."""
    return {index: tensors for part in parts for index, tensors in unpack_groups(part).items()} if aggregated else None


def _get(references: list[Any]) -> list[Any]:
    """Wait for all. An error of ours comes out as it was raised, without Ray's wrapping."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FlexifedError):
            raise error.cause from error
        raise

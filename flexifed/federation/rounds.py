"""The loop of rounds: send each host what its clients share, let them play, average what comes back.

Round r scores what a client holds at its start and then trains; after the last round one more scores what the last
aggregation made. A run of R rounds therefore has R + 1 scores.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from flexifed.config import CellConfig
from flexifed.core.aggregate import GroupState, combine_blocks
from flexifed.data import DatasetInfo
from flexifed.federation.assignment import assign_clients
from flexifed.federation.cell import ClientShards, cell_plan
from flexifed.federation.checkpoint import SHARED, Checkpoint, read_groups, write_groups
from flexifed.federation.client import ClientRound
from flexifed.federation.host import ClientHost, HostRound
from flexifed.training.numerics import numeric_settings


class Hosts(Protocol):
    """Where the clients live: in this process, or in Ray actors. The rounds are the same."""

    @property
    def clients(self) -> Sequence[Sequence[int]]:
        """The clients of each host."""
        ...

    @property
    def exchange(self) -> str:
        """How tensors get from process to process, in words."""
        ...

    def play_round(self, round_index: int, shared: GroupState | None, *, train: bool) -> Sequence[HostRound]:
        """Let all hosts play a round, at the same time where they can."""
        ...

    def state_sha256(self, shared: GroupState | None) -> dict[int, str]:
        """The digest of what each client holds, by client."""
        ...

    def device_names(self) -> list[str]:
        """What each host computes on."""
        ...

    def save(self, folder: Path) -> dict[str, str]:
        """Let each host write what its clients keep; returns the files' names and digests."""
        ...

    def restore(self, checkpoint: Checkpoint) -> None:
        """Let all clients go on from a checkpoint."""
        ...


class LocalHosts:
    """All clients in this process."""

    exchange = "all clients are in one process"

    def __init__(
        self,
        config: CellConfig,
        info: DatasetInfo,
        shards: Sequence[ClientShards],
        clients_per_host: int | None = None,
        streams: int = 1,
    ) -> None:
        self.clients = assign_clients(
            config.partition.client_versions, clients_per_host or len(shards), config.sharing.reduce_block
        )
        self._hosts = [
            ClientHost(config, info, clients, [shards[client] for client in clients], streams)
            for clients in self.clients
        ]

    def play_round(self, round_index: int, shared: GroupState | None, *, train: bool) -> Sequence[HostRound]:
        """One host after another."""
        return [host.play_round(round_index, shared, train=train) for host in self._hosts]

    def state_sha256(self, shared: GroupState | None) -> dict[int, str]:
        """The digest of what each client holds, by client."""
        return {client: digest for host in self._hosts for client, digest in host.state_sha256(shared).items()}

    def device_names(self) -> list[str]:
        """What each host computes on."""
        return [host.device_name() for host in self._hosts]

    def save(self, folder: Path) -> dict[str, str]:
        """Let each host write what its clients keep; returns the files' names and digests."""
        return {name: digest for host in self._hosts for name, digest in host.save(folder).items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Let all clients go on from a checkpoint."""
        for host in self._hosts:
            host.restore(checkpoint)


@dataclass(frozen=True)
class RoundResult:
    """One round of a cell: what its clients measured, in client order, and the number of each one's host.

    `round_s` is its wall time in seconds, training of all clients and aggregation included; `aggregate_s` is the part
    of it in which the driver averages.
    """

    round_index: int
    clients: tuple[ClientRound, ...]
    host_of: tuple[int, ...]
    round_s: float
    aggregate_s: float


class Federation:
    """The driver's side of a cell: the round that it is in, and what clients of different hosts share."""

    def __init__(self, config: CellConfig, info: DatasetInfo, hosts: Hosts) -> None:
        self._config = config
        self.plan = cell_plan(config, info)
        self._groups = self.plan.groups_across(hosts.clients)
        self.shared: GroupState | None = None
        self.next_round = 0
        self._hosts = hosts

    def play_round(self, *, train: bool = True) -> RoundResult:
        """Play the next round: score, and with `train` also train and average."""
        started = time.perf_counter()
        played = self._hosts.play_round(self.next_round, self.shared, train=train)
        aggregating = time.perf_counter()
        if train:
            blocks = {index: block for host in played for index, block in host.blocks.items()}
            with numeric_settings(self._config.numerics):
                self.shared = combine_blocks(self.plan, (blocks[index] for index in sorted(blocks)), self._groups)
            if any(tensor.is_cuda for tensors in self.shared.values() for tensor in tensors):
                torch.cuda.synchronize()  # a round ends when its work does, and the clients' tensors are free again
        finished = time.perf_counter()
        clients = sorted(
            ((client, host) for host, one in enumerate(played) for client in one.clients),
            key=lambda measured: measured[0].client,
        )
        result = RoundResult(
            round_index=self.next_round,
            clients=tuple(client for client, _ in clients),
            host_of=tuple(host for _, host in clients),
            round_s=finished - started,
            aggregate_s=finished - aggregating,
        )
        self.next_round += train
        return result

    def state_sha256(self) -> tuple[str, ...]:
        """The digest of what each client holds now, in client order."""
        digests = self._hosts.state_sha256(self.shared)
        return tuple(digests[client] for client in sorted(digests))

    def save(self, folder: Path) -> dict[str, str]:
        """Write everything that the rounds to come depend on; returns the files' names and digests."""
        return {**self._hosts.save(folder), SHARED: write_groups(folder / SHARED, self.shared or {})}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this cell."""
        self.shared = read_groups(checkpoint, self._groups)
        self.next_round = checkpoint.next_round
        self._hosts.restore(checkpoint)

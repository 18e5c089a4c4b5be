"""The rounds of a cell: send each host the groups of its clients, let the clients play, average what comes back.

Round r scores each client's model as it is at the start of the round, then trains it. After the last round of training,
one more round scores the result of the last aggregation. A run of R rounds therefore has R + 1 scores.

With `clients_per_round`, only the participants that are drawn for a round train in it, and only they send and receive.
All clients are scored in every round, with what they would receive. A group is averaged over those of its clients that
take part; if none of them does, it keeps its values.
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
from flexifed.federation.cell import ClientShards, averaged_groups, cell_plan, check_shards, participants
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
        """How tensors get from process to process, as words for the log."""
        ...

    def play_round(self, round_index: int, shared: GroupState, *, train: bool) -> Sequence[HostRound]:
        """Let all hosts play a round, at the same time where they can."""
        ...

    def state_sha256(self, shared: GroupState) -> dict[int, str]:
        """The digest of each client's whole state, by client."""
        ...

    def device_names(self) -> list[str]:
        """The name of each host's device."""
        ...

    def save(self, folder: Path) -> dict[str, str]:
        """Let each host write its part of a checkpoint; returns the files' SHA-256 by name."""
        ...

    def restore(self, checkpoint: Checkpoint) -> None:
        """Let all clients resume from a checkpoint."""
        ...


class LocalHosts:
    """All clients in this process.

    Args:
        config: the cell.
        info: its data.
        shards: each client's samples, in client order, as from `make_shards`.
        clients_per_host: which clients' sums are formed together; None for all. It changes no number.
        streams: so many clients overlap on a GPU.

    Raises:
        ConfigError: as `check_shards`.
    """

    exchange = "all clients are in one process"

    def __init__(
        self,
        config: CellConfig,
        info: DatasetInfo,
        shards: Sequence[ClientShards],
        clients_per_host: int | None = None,
        streams: int = 1,
    ) -> None:
        check_shards(shards, config, info)
        self.clients = assign_clients(
            config.client_versions, clients_per_host or len(shards), config.sharing.reduce_block
        )
        self._hosts = [
            ClientHost(config, info, clients, [shards[client] for client in clients], streams)
            for clients in self.clients
        ]

    def play_round(self, round_index: int, shared: GroupState, *, train: bool) -> Sequence[HostRound]:
        """Let one host after another play a round."""
        return [host.play_round(round_index, shared, train=train) for host in self._hosts]

    def state_sha256(self, shared: GroupState) -> dict[int, str]:
        """The digest of each client's whole state, by client."""
        return {client: digest for host in self._hosts for client, digest in host.state_sha256(shared).items()}

    def device_names(self) -> list[str]:
        """The name of each host's device."""
        return [host.device_name() for host in self._hosts]

    def save(self, folder: Path) -> dict[str, str]:
        """Let each host write its part of a checkpoint; returns the files' SHA-256 by name."""
        return {name: digest for host in self._hosts for name, digest in host.save(folder).items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Let all clients resume from a checkpoint."""
        for host in self._hosts:
            host.restore(checkpoint)


@dataclass(frozen=True)
class RoundResult:
    """One round of a cell.

    Attributes:
        round_index: number of the round, from 0.
        clients: the clients' measurements, in client order.
        host_of: number of each client's host.
        round_s: wall time of the round in seconds, including all clients' training and the aggregation.
        aggregate_s: the part of `round_s` in which the driver averages.
    """

    round_index: int
    clients: tuple[ClientRound, ...]
    host_of: tuple[int, ...]
    round_s: float
    aggregate_s: float


class Federation:
    """The driver's side of a cell: the next round, and the groups that clients of different hosts share."""

    def __init__(self, config: CellConfig, info: DatasetInfo, hosts: Hosts) -> None:
        self._config = config
        self.plan = cell_plan(config, info)
        self._across_group_indices = {group.index for group in self.plan.groups_across(hosts.clients)}
        self.shared: GroupState = {}
        self.next_round = 0
        self._hosts = hosts

    def play_round(self, *, train: bool = True) -> RoundResult:
        """Play the next round: score all clients, and with `train` also train and average."""
        started = time.perf_counter()
        played = self._hosts.play_round(self.next_round, self.shared, train=train)
        aggregating = time.perf_counter()
        if train:
            blocks = {index: block for host in played for index, block in host.blocks.items()}
            trained = self.plan.groups_with(participants(self._config, self.next_round))
            groups = [group for group in trained if group.index in self._across_group_indices]
            with numeric_settings(self._config.numerics):
                means = combine_blocks(self.plan, (blocks[index] for index in sorted(blocks)), groups)
            self.shared = {**self.shared, **means}
            if any(tensor.is_cuda for tensors in self.shared.values() for tensor in tensors):
                torch.cuda.synchronize()  # so that a round ends with its work on the GPU, and clients can reuse tensors
        finished = time.perf_counter()
        clients = sorted(
            ((client, host) for host, host_round in enumerate(played) for client in host_round.clients),
            key=lambda pair: pair[0].client,
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
        """The digest of each client's current state, in client order."""
        digests = self._hosts.state_sha256(self.shared)
        return tuple(digests[client] for client in sorted(digests))

    def save(self, folder: Path) -> dict[str, str]:
        """Write everything that later rounds depend on; returns the files' SHA-256 by name."""
        return {**self._hosts.save(folder), SHARED: write_groups(folder / SHARED, self.shared)}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint of this cell."""
        averaged = averaged_groups(self._config, self.plan, checkpoint.next_round)
        self.shared = read_groups(
            checkpoint, [group for group in averaged if group.index in self._across_group_indices]
        )
        self.next_round = checkpoint.next_round
        self._hosts.restore(checkpoint)

"""The clients of one process, in whole blocks of consecutive clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from flexifed.config import CellConfig
from flexifed.core.aggregate import BlockSums, GroupState, blocks_of, combine_blocks, sum_block
from flexifed.data import DatasetInfo, make_pipeline, open_dataset
from flexifed.errors import DeviceMemoryError
from flexifed.federation.assignment import name_clients
from flexifed.federation.cell import (
    ClientShards,
    averaged_groups,
    cell_plan,
    client_weight,
    make_workspace,
    participants,
)
from flexifed.federation.checkpoint import (
    CLIENTS,
    Checkpoint,
    read_clients,
    read_groups,
    state_sha256,
    write_clients,
    write_groups,
)
from flexifed.federation.client import Client, ClientRound
from flexifed.training.memory import device_shortages
from flexifed.training.numerics import device_name, numeric_settings
from flexifed.training.streams import Stream, overlap

Play = tuple[Client, ClientRound, GroupState | None]
"""A client, its measurements in a round, and the tensors that it shares (None if it did not train)."""


@dataclass(frozen=True)
class HostRound:
    """The measurements of a host's clients in a round, and the sums of the tensors that they share.

    Attributes:
        clients: measurements in client order.
        blocks: sums by number of the block; block b begins with client b * reduce_block. Groups that the host averages
            itself are left out.
    """

    clients: tuple[ClientRound, ...]
    blocks: Mapping[int, BlockSums]


class ClientHost:
    """Clients that take turns in one process. A plain class; the Ray floor wraps it in an actor.

    Groups whose clients all live here are averaged here, and their values stay: no other process needs them.

    Args:
        config: the cell.
        info: the data set; it is opened here, samples are not sent.
        clients: indices of the clients, ascending; whole blocks of `reduce_block` consecutive clients.
        shards: the samples of each of these clients.
        streams: number of clients that compute on the GPU at the same time.
    """

    def __init__(
        self,
        config: CellConfig,
        info: DatasetInfo,
        clients: Sequence[int],
        shards: Sequence[ClientShards],
        streams: int = 1,
    ) -> None:
        device = torch.device(config.device)
        self._config = config
        self._device = device
        self._plan = cell_plan(config, info)
        architectures = {self._plan.architecture_of[client] for client in clients}
        groups = {group for architecture in architectures for group in self._plan.group_of[architecture]}
        self._groups = sorted(group for group in groups if group is not None)
        self._own_group_indices = {group.index for group in self._plan.groups_within(clients)}
        self._own_means: GroupState = {}
        data = open_dataset(info)
        pipeline = make_pipeline(data, config.family, device=device, channels_last=config.numerics.channels_last)
        self._streams = [Stream(device) for _ in range(streams)]
        models = [config.model_name(index) for index in clients]
        keys = [
            (name, overlapping[:position].count(name))  # clients that overlap each need a workspace of their own
            for overlapping in blocks_of(models, streams)
            for position, name in enumerate(overlapping)
        ]
        workspaces = {(name, number): make_workspace(config, info, name) for name, number in sorted(set(keys))}
        self._clients = [
            Client(
                index,
                config=config,
                plan=self._plan,
                workspace=workspaces[key],
                data=data,
                shards=client_shards,
                pipeline=pipeline,
            )
            for index, client_shards, key in zip(clients, shards, keys, strict=True)
        ]

    def play_round(self, round_index: int, shared: GroupState, *, train: bool) -> HostRound:
        """Play a round with all clients; see `Client.play_round`.

        Args:
            shared: the groups that clients here share with clients of other hosts, as far as they have been averaged.

        Raises:
            ClientError: as `Client.play_round`.
            DeviceMemoryError: the GPU had too little memory for the algorithms that this round's bits depend on.
        """
        shortages = device_shortages(self._device)
        taking_part = participants(self._config, round_index)
        with numeric_settings(self._config.numerics):
            measured, blocks = self._sum_blocks(self._play(round_index, self._complete(shared), train, taking_part))
            if train:
                groups = [
                    group for group in self._plan.groups_with(taking_part) if group.index in self._own_group_indices
                ]
                self._own_means |= combine_blocks(self._plan, blocks.values(), groups)
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # so that a round ends, or fails, with its work on the GPU
        if device_shortages(self._device) > shortages:
            clients = name_clients([client.index for client in self._clients])
            raise DeviceMemoryError(
                f"{clients}, round {round_index}: the GPU was too full at some point, so that a convolution may have "
                "used an algorithm that needs less memory and rounds differently"
            )
        sent = {
            number: {group: block_sum for group, block_sum in sums.items() if group not in self._own_means}
            for number, sums in blocks.items()
        }
        return HostRound(measured, sent if train else {})

    def _play(self, round_index: int, shared: GroupState, train: bool, taking_part: Set[int]) -> Iterator[Play]:
        """Let the clients play, as many at a time as there are streams."""
        for clients in blocks_of(self._clients, len(self._streams)):
            rounds = [
                client.play_round(round_index, shared, train=train, participates=client.index in taking_part)
                for client in clients
            ]
            for client, (client_round, contribution) in zip(clients, overlap(rounds, self._streams), strict=True):
                yield client, client_round, contribution

    def _sum_blocks(self, plays: Iterable[Play]) -> tuple[tuple[ClientRound, ...], dict[int, BlockSums]]:
        """Sum what the clients of each block share, as they finish; returns measurements, and sums by block."""
        measured: list[ClientRound] = []

        def contributions(plays: Iterable[Play]) -> Iterator[tuple[GroupState, float]]:
            for client, client_round, contribution in plays:
                measured.append(client_round)
                if contribution is not None:
                    yield contribution, client_weight(self._config, client.num_train)

        by_block = groupby(plays, key=lambda play: play[0].index // self._config.sharing.reduce_block)
        blocks = {block: sum_block(contributions(members)) for block, members in by_block}
        return tuple(measured), blocks

    def device_name(self) -> str:
        """The name of the device on which the clients compute."""
        return device_name(self._device)

    def save(self, folder: Path) -> dict[str, str]:
        """Write the tensors that clients keep, and this host's own groups; returns the files' SHA-256 by name."""
        first = self._clients[0].index
        clients, groups = f"{CLIENTS}{first:06d}.safetensors", f"shared-{first:06d}.safetensors"
        written = {clients: write_clients(folder / clients, {client.index: client.kept for client in self._clients})}
        if self._own_means:
            written[groups] = write_groups(folder / groups, self._own_means)
        return written

    def restore(self, checkpoint: Checkpoint) -> None:
        """Let the clients resume from a checkpoint, whichever processes they lived in when it was written."""
        kept = read_clients(checkpoint, [client.index for client in self._clients])
        for client in self._clients:
            client.restore(kept[client.index])
        averaged = averaged_groups(self._config, self._plan, checkpoint.next_round)
        own_groups = [group for group in averaged if group.index in self._own_group_indices]
        self._own_means = self._on_device(read_groups(checkpoint, own_groups))

    def state_sha256(self, shared: GroupState) -> dict[int, str]:
        """The digest of each client's whole state, by client."""
        groups = self._complete(shared)
        return {client.index: state_sha256(client.state(groups)) for client in self._clients}

    def _complete(self, shared: GroupState) -> GroupState:
        """All groups of this host's clients, on its device: those that it received, and its own."""
        return self._on_device({group: shared[group] for group in self._groups if group in shared}) | self._own_means

    def _on_device(self, state: GroupState) -> GroupState:
        return {group: tuple(tensor.to(self._device) for tensor in tensors) for group, tensors in state.items()}

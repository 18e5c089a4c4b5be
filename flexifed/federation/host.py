"""Some clients in one process, in whole blocks of consecutive ones, and everything they need there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from flexifed.config import CellConfig
from flexifed.core.aggregate import BlockSums, GroupState, blocks_of, combine_blocks, sum_block
from flexifed.data import DatasetInfo, make_pipeline, open_dataset
from flexifed.errors import DeviceMemoryError
from flexifed.federation.assignment import name_clients
from flexifed.federation.cell import ClientShards, cell_plan, client_weight, make_workspace
from flexifed.federation.checkpoint import Checkpoint, read_groups, read_tensors, write_groups, write_tensors
from flexifed.federation.client import Client, ClientRound
from flexifed.training.memory import device_shortages
from flexifed.training.numerics import device_name, numeric_settings
from flexifed.training.streams import Stream, overlap

_CLIENTS = "clients-"
Play = tuple[Client, ClientRound, GroupState | None]
"""A client, what it measured in a round, and the tensors that it shares; None if it did not train."""


@dataclass(frozen=True)
class HostRound:
    """What a host's clients measured in a round, and the sums of what they share.

    Attributes:
        clients: in client order.
        blocks: by block of clients: block b holds clients b * reduce_block and on. Groups that the host averages itself
            are not in them.
    """

    clients: tuple[ClientRound, ...]
    blocks: Mapping[int, BlockSums]


class ClientHost:
    """Clients that take turns in one process. A plain class; the Ray floor makes an actor of it.

    A group whose clients all live here is averaged here, and its values stay: nobody else ever needs them.

    Args:
        config: the cell.
        info: which data set; it is opened here, samples do not travel.
        clients: indices, ascending; whole blocks of `reduce_block` consecutive clients.
        shards: one for each of them.
        streams: so many clients compute on the GPU at the same time.
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
        self._own_groups = self._plan.groups_within(clients)
        self._own_means: GroupState = {}
        data = open_dataset(info)
        pipeline = make_pipeline(data, config.family, device=device, channels_last=config.numerics.channels_last)
        self._streams = [Stream(device) for _ in range(streams)]
        in_turn = [config.model_name(index) for index in clients]
        places = [
            (name, together[:position].count(name))  # clients that overlap each need a workspace of their own
            for together in blocks_of(in_turn, streams)
            for position, name in enumerate(together)
        ]
        workspaces = {place: make_workspace(config, info, place[0]) for place in sorted(set(places))}
        self._clients = [
            Client(
                index,
                config=config,
                plan=self._plan,
                workspace=workspaces[place],
                data=data,
                shards=one,
                pipeline=pipeline,
            )
            for index, one, place in zip(clients, shards, places, strict=True)
        ]

    def play_round(self, round_index: int, shared: GroupState | None, *, train: bool) -> HostRound:
        """Play a round with all clients; see `Client.play_round`.

        Args:
            shared: the groups that clients here have in common with clients elsewhere; None before the first
                aggregation.

        Raises:
            ClientError: as `Client.play_round`.
            DeviceMemoryError: a GPU was too full for the algorithms that give this round its bits.
        """
        shortages = device_shortages(self._device)
        measured: list[ClientRound] = []
        blocks: dict[int, BlockSums] = {}

        def contributions(plays: Iterable[Play]) -> Iterator[tuple[GroupState, float]]:
            """Note what clients measured, and pass on what they share, with their weights."""
            for client, client_round, contribution in plays:
                measured.append(client_round)
                if contribution is not None:
                    yield contribution, client_weight(self._config, client.num_train)

        with numeric_settings(self._config.numerics):
            plays = self._play(round_index, self._complete(shared), train)
            for block, members in groupby(plays, key=lambda play: play[0].index // self._config.sharing.reduce_block):
                sums = sum_block(contributions(members))
                if train:
                    blocks[block] = sums
            if train:
                self._own_means = combine_blocks(self._plan, blocks.values(), self._own_groups)
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # a round ends, and fails, when its work does
        if device_shortages(self._device) > shortages:
            clients = name_clients([client.index for client in self._clients])
            raise DeviceMemoryError(
                f"{clients}, round {round_index}: the GPU was too full at some point, so that a convolution may have "
                "taken an algorithm with less memory and other rounding"
            )
        leaving = {
            number: {group: one for group, one in sums.items() if group not in self._own_means}
            for number, sums in blocks.items()
        }
        return HostRound(tuple(measured), leaving)

    def _play(self, round_index: int, shared: GroupState | None, train: bool) -> Iterator[Play]:
        """Let the clients play, as many at a time as there are streams."""
        for clients in blocks_of(self._clients, len(self._streams)):
            rounds = [client.play_round(round_index, shared, train=train) for client in clients]
            for client, (client_round, contribution) in zip(clients, overlap(rounds, self._streams), strict=True):
                yield client, client_round, contribution

    def device_name(self) -> str:
        """What the clients compute on."""
        return device_name(self._device)

    def save(self, folder: Path) -> dict[str, str]:
        """Write what the clients keep to themselves, and this host's own groups; returns the files' SHA-256 by name."""
        first = self._clients[0].index
        clients, groups = f"{_CLIENTS}{first:06d}.safetensors", f"shared-{first:06d}.safetensors"
        kept = {f"{one.index}/{key}": tensor for one in self._clients for key, tensor in one.kept.items()}
        written = {clients: write_tensors(folder / clients, kept)}
        if self._own_means:
            written[groups] = write_groups(folder / groups, self._own_means)
        return written

    def restore(self, checkpoint: Checkpoint) -> None:
        """Let the clients go on from a checkpoint, in whichever processes they lived when it was written."""
        kept: dict[int, dict[str, torch.Tensor]] = {client.index: {} for client in self._clients}
        for name in checkpoint.files:
            if name.startswith(_CLIENTS):
                mine = read_tensors(checkpoint.folder / name, lambda key: int(key.split("/")[0]) in kept)
                for key, tensor in mine.items():
                    index, tensor_name = key.split("/", 1)
                    kept[int(index)][tensor_name] = tensor
        for client in self._clients:
            client.restore(kept[client.index])
        self._own_means = self._on_device(read_groups(checkpoint, self._own_groups))

    def state_sha256(self, shared: GroupState | None) -> dict[int, str]:
        """The digest of what each client holds, by client."""
        held = self._complete(shared)
        return {client.index: client.state_sha256(held) for client in self._clients}

    def _complete(self, shared: GroupState | None) -> GroupState | None:
        """All groups of this host's clients, on its device: those that were sent, and its own."""
        if shared is None:
            return None
        return self._on_device({group: shared[group] for group in self._groups if group in shared}) | self._own_means

    def _on_device(self, state: GroupState) -> GroupState:
        return {group: tuple(tensor.to(self._device) for tensor in tensors) for group, tensors in state.items()}

"""Some consecutive clients in one process, and everything they need there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

import torch
from torch import nn

from flexifed.config import NUM_VERSIONS, CellConfig
from flexifed.core.aggregate import BlockSums, GroupState, blocks_of, sum_block
from flexifed.core.schemes import SharingPlan, sharing_plan
from flexifed.data import DatasetInfo, make_pipeline, open_dataset
from flexifed.errors import ConfigError
from flexifed.federation.checkpoint import Checkpoint, read_tensors, write_tensors
from flexifed.federation.client import Client, ClientRound, ClientShards
from flexifed.models import build_model, model_signature
from flexifed.training.numerics import device_name, numeric_settings

_CLIENTS = "clients-"
_MOST_NAMED = 8


@dataclass(frozen=True)
class HostRound:
    """What a host's clients measured in a round, and the sums of what they share.

    Attributes:
        clients: in client order.
        blocks: by block of clients: block b holds clients b * reduce_block and on.
        busy_s: wall time that the host spent on it.
    """

    clients: tuple[ClientRound, ...]
    blocks: Mapping[int, BlockSums]
    busy_s: float


class ClientHost:
    """Clients that take turns in one process. A plain class; the Ray floor makes an actor of it.

    Args:
        config: the cell.
        info: which data set; it is opened here, samples do not travel.
        clients: indices, ascending; whole blocks of `reduce_block` consecutive clients.
        shards: one for each of them.
    """

    def __init__(
        self, config: CellConfig, info: DatasetInfo, clients: Sequence[int], shards: Sequence[ClientShards]
    ) -> None:
        device = torch.device(config.device)
        self._config = config
        self._plan = cell_plan(config, info)
        data = open_dataset(info)
        pipeline = make_pipeline(data, config.family, device=device, channels_last=config.numerics.channels_last)
        workspaces = {
            name: _workspace(name, config, info) for name in sorted({config.model_name(index) for index in clients})
        }
        self._clients = [
            Client(
                index,
                config=config,
                plan=self._plan,
                workspace=workspaces[config.model_name(index)],
                data=data,
                shards=one,
                pipeline=pipeline,
            )
            for index, one in zip(clients, shards, strict=True)
        ]

    def play_round(self, round_index: int, shared: GroupState | None, *, train: bool) -> HostRound:
        """Play a round with each client in turn; see `Client.play_round`."""
        started = time.perf_counter()
        measured: list[ClientRound] = []
        blocks: dict[int, BlockSums] = {}
        if shared is not None:
            shared = self._on_device(shared)
        with numeric_settings(self._config.numerics):
            for block in blocks_of(self._clients, self._config.sharing.reduce_block):
                contributions = self._play(block, round_index, shared, train, measured)
                blocks[block[0].index // self._config.sharing.reduce_block] = sum_block(contributions)
        return HostRound(tuple(measured), blocks, time.perf_counter() - started)

    def _play(
        self,
        clients: Sequence[Client],
        round_index: int,
        shared: GroupState | None,
        train: bool,
        measured: list[ClientRound],
    ) -> Iterator[tuple[GroupState, float]]:
        """Let one client after another play; what it measured goes to a list, what it shares to the caller."""
        for client in clients:
            one, contribution = client.play_round(round_index, shared, train=train)
            measured.append(one)
            if contribution is not None:
                yield contribution, client_weight(self._config, client.num_train)

    def device_name(self) -> str:
        """What the clients compute on."""
        return device_name(torch.device(self._config.device))

    def save(self, folder: Path) -> dict[str, str]:
        """Write what the clients keep to themselves; returns the file's name and its SHA-256."""
        name = f"{_CLIENTS}{self._clients[0].index:06d}.safetensors"
        kept = {f"{one.index}/{key}": tensor for one in self._clients for key, tensor in one.kept.items()}
        return {name: write_tensors(folder / name, kept)}

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

    def state_sha256(self, shared: GroupState | None) -> dict[int, str]:
        """The digest of what each client holds, by client."""
        return {client.index: client.state_sha256(shared) for client in self._clients}

    def _on_device(self, shared: GroupState) -> GroupState:
        """The groups of this host's clients, moved to its device once for all of them."""
        device = torch.device(self._config.device)
        mine = {group for client in self._clients for group in self._plan.shared_names(client.index)}
        return {group: tuple(tensor.to(device) for tensor in shared[group]) for group in sorted(mine)}


def _workspace(name: str, config: CellConfig, info: DatasetInfo) -> nn.Module:
    """A model whose values don't matter; clients of its architecture take turns in it."""
    model = build_model(
        name, num_classes=info.num_classes, in_channels=info.in_channels, width=config.model.width, device=config.device
    )
    if config.numerics.channels_last:
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def cell_plan(config: CellConfig, info: DatasetInfo) -> SharingPlan:
    """The sharing plan of a cell. Every process derives it from the config; it never travels."""
    signatures = {
        name: model_signature(
            name, num_classes=info.num_classes, in_channels=info.in_channels, width=config.model.width
        )
        for name in config.versions
    }
    return sharing_plan(
        [signatures[config.model_name(client)] for client in range(config.partition.num_clients)],
        config.scheme,
        weighting=config.sharing.weighting,
        batch_norm_buffers=config.sharing.batch_norm_buffers,
        classifier=config.sharing.classifier,
    )


def state_bytes(config: CellConfig, info: DatasetInfo) -> int:
    """Bytes of a cell's whole state, as a checkpoint holds it: one tensor for each group, and what is personal."""
    plan = cell_plan(config, info)
    personal = 0
    for client, architecture in enumerate(plan.architecture_of):
        whole = sum(spec.num_bytes for layer in plan.signatures[client].layers for spec in layer.tensors)
        personal += whole - sum(group.num_bytes for group in plan.groups_of(architecture))
    return personal + sum(group.num_bytes for group in plan.groups)


def client_weight(config: CellConfig, num_train: int) -> float:
    """A client's weight in a mean: FedAvg's number of samples, or 1."""
    return float(num_train) if config.sharing.weighting == "samples" else 1.0


def assign_clients(num_clients: int, clients_per_host: int, reduce_block: int) -> list[tuple[int, ...]]:
    """Which clients live together: whole blocks, dealt so that all hosts finish a round at about the same time.

    A block goes to the host that has the least to do, those with the deepest models first (Graham's longest processing
    time rule). A version's number stands for its cost, since a family's versions go from the shallowest to the deepest.

    Returns:
        Indices for each host, ascending, at most `clients_per_host` of them; hosts in the order of their first client.

    Raises:
        ConfigError: hosts would cut through the blocks whose sums are formed in one process.
    """
    if clients_per_host < num_clients and clients_per_host % reduce_block:
        raise ConfigError(
            f"clients_per_actor is {clients_per_host}, no multiple of reduce_block ({reduce_block}); a block of "
            f"clients lives in one process: use {reduce_block * -(-clients_per_host // reduce_block)} clients an actor"
        )
    blocks = blocks_of(range(num_clients), reduce_block)
    most = -(-clients_per_host // reduce_block)
    hosts: list[list[int]] = [[] for _ in range(-(-len(blocks) // most))]
    with_room = [(0, 0, host) for host in range(len(hosts))]  # cost so far, number of blocks, which host
    for cost, block in sorted(((_cost(block), block) for block in blocks), key=lambda one: -one[0]):
        load, held, host = heappop(with_room)
        hosts[host] += block
        if held + 1 < most:
            heappush(with_room, (load + cost, held + 1, host))
    return sorted(tuple(sorted(clients)) for clients in hosts)


def _cost(block: Sequence[int]) -> int:
    return sum(client % NUM_VERSIONS + 1 for client in block)


def name_clients(clients: Sequence[int]) -> str:
    """Words for the clients of a host: `client 3`, `clients 0 to 3`, or `clients 0, 3, 4 and 12 more`."""
    if len(clients) == 1:
        return f"client {clients[0]}"
    if clients[-1] - clients[0] == len(clients) - 1:
        return f"clients {clients[0]} to {clients[-1]}"
    shown = ", ".join(map(str, clients[:_MOST_NAMED]))
    return f"clients {shown}" + (f" and {len(clients) - _MOST_NAMED} more" if len(clients) > _MOST_NAMED else "")

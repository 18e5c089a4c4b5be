"""How many clients go into an actor, what an actor asks for, and whether the cluster could ever hold that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from flexifed.config import CellConfig
from flexifed.errors import ConfigError, ResourceError
from flexifed.federation.assignment import assign_clients
from flexifed.wording import counted

DEFAULT_GPUS_PER_CLIENT = 0.125
_LEAST_SHARE = 0.0001
"""Of a GPU; Ray counts no smaller ones."""
Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """Where clients run. None of it can change a number.

    Attributes:
        gpus_per_client: fraction of a GPU for each client; None: an eighth on a GPU, 0 without one, and less where
            clients take turns.
        clients_per_actor: clients that live in one process; None: on GPUs as many as have a stream, and more where the
            GPUs could not hold them so; on CPUs as many as it takes to give every CPU one actor.
        streams: so many of an actor's clients compute on its GPU at the same time.
        cuda_ipc: processes on one GPU leave tensors there for each other.
    """

    gpus_per_client: float | None = None
    clients_per_actor: int | None = None
    streams: int = 1
    cuda_ipc: bool = True

    def __post_init__(self) -> None:
        if self.gpus_per_client is not None and not 0 <= self.gpus_per_client < math.inf:
            raise ConfigError(f"gpus_per_client is {self.gpus_per_client!r}; it must be a number of at least 0")
        if self.clients_per_actor is not None and self.clients_per_actor < 1:
            raise ConfigError(f"clients_per_actor is {self.clients_per_actor!r}; it must be at least 1")
        if self.streams < 1:
            raise ConfigError(f"streams is {self.streams!r}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CellPlacement:
    """The actors of one cell: which clients each holds, how many of them overlap, and what each actor asks for."""

    clients: tuple[tuple[int, ...], ...]
    cpus_per_actor: float
    gpus_per_actor: float
    streams: int = 1
    cuda_ipc: bool = True

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The placement group's bundles: an empty one for the driver, which only adds up, then one for each actor."""
        actor = {"CPU": self.cpus_per_actor}
        if self.gpus_per_actor:
            actor["GPU"] = self.gpus_per_actor
        return [{}, *({**actor} for _ in self.clients)]

    def __str__(self) -> str:
        most = max(len(clients) for clients in self.clients)
        gpus = f" and {self.gpus_per_actor:g} GPU" if self.gpus_per_actor else ""
        clients = f"{'up to ' if most > 1 else ''}{counted(most, 'client')}"
        streams = f", {self.streams} at a time" if self.streams > 1 else ""
        actors = counted(len(self.clients), "actor")
        return f"{actors} of {clients}{streams}, each {self.cpus_per_actor:g} CPU{gpus}"


def place_cell(config: CellConfig, options: PlacementOptions, nodes: Sequence[Resources]) -> CellPlacement:
    """Decide a cell's actors.

    Args:
        config: the cell.
        options: what the user asks for.
        nodes: the resources of each node of the cluster, `CPU` and `GPU` among them.

    Raises:
        ResourceError: the nodes could not hold the actors, even with nothing else on them.
        ConfigError: actors that would cut through blocks of `reduce_block` clients.
    """
    if config.device == "cuda" and options.gpus_per_client is not None and options.gpus_per_client < _LEAST_SHARE:
        raise ResourceError(
            f"device is 'cuda' but gpus_per_client is {options.gpus_per_client:g}; give clients a share of a GPU, at "
            f"least {_LEAST_SHARE:g}, or use --device cpu"
        )
    if options.streams > 1 and config.device == "cpu":
        raise ResourceError(
            f"streams is {options.streams}, but device is 'cpu', which has none; leave --streams out, or use --device "
            "cuda"
        )
    clients = _dealt_out(config, options, nodes)
    most = max(map(len, clients))
    gpus_per_actor = _gpu_share(config, options, nodes, clients)
    if gpus_per_actor > 1 and _gpus(nodes):
        raise ResourceError(
            f"an actor of {counted(most, 'client')} asks for {gpus_per_actor:g} GPUs, but a process computes on one: "
            f"lower --gpus-per-client to at most {math.floor(10_000 / most) / 10_000:g}"
        )
    shares = _cpu_shares(len(clients), config.numerics.threads, nodes)
    placements = [
        CellPlacement(
            clients=tuple(clients),
            cpus_per_actor=share,
            gpus_per_actor=gpus_per_actor,
            streams=min(options.streams, most),
            cuda_ipc=options.cuda_ipc,
        )
        for share in shares
    ]
    fitting = next((one for one in placements if holds(nodes, one)), None)
    return fitting or _refuse(placements[-1], nodes)


def _dealt_out(config: CellConfig, options: PlacementOptions, nodes: Sequence[Resources]) -> Sequence[tuple[int, ...]]:
    """The clients of each actor; see `PlacementOptions`."""
    num_clients, block = config.partition.num_clients, config.sharing.reduce_block
    per_actor = options.clients_per_actor
    if per_actor is None:
        if options.gpus_per_client or config.device == "cuda":
            wanted = options.streams
            if options.gpus_per_client is None:
                share = min(1.0, DEFAULT_GPUS_PER_CLIENT * options.streams)
                places = _gpus(nodes) * int(1 / share)
                wanted = max(wanted, math.ceil(num_clients / places)) if places else wanted
        else:
            total_cpus = sum(node.get("CPU", 0) for node in nodes)
            wanted = math.ceil(num_clients / max(1, int(total_cpus) // config.numerics.threads))
        per_actor = block * math.ceil(wanted / block)
    return assign_clients(num_clients, per_actor, block)


def _gpu_share(
    config: CellConfig, options: PlacementOptions, nodes: Sequence[Resources], clients: Sequence[tuple[int, ...]]
) -> float:
    """What an actor asks for: as its clients' shares add up; where nobody said anything, no more than there is."""
    most = max(map(len, clients))
    if options.gpus_per_client is not None:
        return round(options.gpus_per_client * most, 4)
    if config.device == "cpu":
        return 0.0
    share = round(min(1.0, DEFAULT_GPUS_PER_CLIENT * most), 4)
    if gpus := _gpus(nodes):
        share = min(share, math.floor(10_000 / math.ceil(len(clients) / gpus)) / 10_000)
    return max(share, _LEAST_SHARE)


def _gpus(nodes: Sequence[Resources]) -> int:
    """Of nodes that also have CPUs, which every actor asks for."""
    return sum(int(node.get("GPU", 0)) for node in nodes if node.get("CPU", 0))


def holds(nodes: Sequence[Resources], placement: CellPlacement) -> bool:
    """Whether the nodes could hold a cell's actors, with nothing else on them."""
    return _held(placement, nodes) >= len(placement.clients)


def halved(placement: CellPlacement, config: CellConfig, nodes: Sequence[Resources]) -> CellPlacement | None:
    """The same cell with half as many clients at a time on a GPU, which changes no number.

    Where clients of an actor overlap, half as many of them do. Otherwise half as many actors have room on a GPU, each
    with twice the share of it, whichever cells they are of; where the nodes don't hold that many, fewer actors host
    more clients each.

    Returns:
        None where an actor has a GPU to itself already, or has none, and its clients take turns.
    """
    if placement.streams > 1:
        return replace(placement, streams=placement.streams // 2)
    sharing = int(1 / placement.gpus_per_actor + 1e-6) if placement.gpus_per_actor else 0
    if sharing < 2:
        return None
    roomier = replace(placement, gpus_per_actor=math.floor(10_000 / (sharing // 2)) / 10_000)
    num_clients, block = config.partition.num_clients, config.sharing.reduce_block
    wanted = max(max(map(len, placement.clients)), math.ceil(num_clients / max(1, _held(roomier, nodes))))
    return replace(roomier, clients=tuple(assign_clients(num_clients, block * math.ceil(wanted / block), block)))


def _cpu_shares(num_actors: int, threads: int, nodes: Sequence[Resources]) -> list[float]:
    """CPUs that an actor may ask for, largest first: one for each thread, or a node's CPUs shared by some actors."""
    parts = {node.get("CPU", 0) / count for node in nodes for count in range(1, num_actors + 1)}
    shares = {math.floor(min(threads, part) * 1000) / 1000 for part in parts}
    return sorted((share for share in shares if share > 0), reverse=True) or [0.0]


def _held(placement: CellPlacement, nodes: Sequence[Resources]) -> int:
    """How many actors like these the nodes hold with nothing else on them."""
    needed = {"CPU": placement.cpus_per_actor, "GPU": placement.gpus_per_actor}
    return sum(_actors_on(node, needed) for node in nodes)


def _refuse(placement: CellPlacement, nodes: Sequence[Resources]) -> NoReturn:
    """Say what Ray would wait for without a word and without end."""
    held = _held(placement, nodes)
    have = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
    gpus, on_one = _gpus(nodes), int(1 / placement.gpus_per_actor + 1e-6) if placement.gpus_per_actor else 0
    if not any(node.get("CPU", 0) for node in nodes):
        remedy = "no node has CPUs, so add nodes that have"
    elif placement.gpus_per_actor and not gpus:
        remedy = (
            "no node has a GPU beside CPUs, so use --device cpu without --gpus-per-client or --streams, or add nodes "
            "that have one"
        )
    elif on_one and gpus * on_one < len(placement.clients):
        remedy = f"leave --gpus-per-client out{_lower_share(placement, gpus)}, or add nodes"
    else:
        remedy = "raise --clients-per-actor, or add nodes"
    raise ResourceError(
        f"a cell needs {placement}, but the cluster could hold only {held} of them with nothing else running "
        f"(its nodes: {have}): {remedy}"
    )


def _lower_share(placement: CellPlacement, gpus: int) -> str:
    """What else than a default each client could ask for; nothing, if that is below what Ray counts."""
    actors_on_one = math.ceil(len(placement.clients) / gpus)
    share = math.floor(10_000 / actors_on_one / max(map(len, placement.clients))) / 10_000
    return f", or lower it to {share:g}" if share else ""


def _actors_on(node: Resources, needed: Mapping[str, float]) -> int:
    """How many actors an empty node holds. A share of a GPU lies on one GPU, so shares fill GPUs one by one."""
    counts = []
    if needed["CPU"]:
        counts.append(int(node.get("CPU", 0) / needed["CPU"] + 1e-6))
    if gpu := needed["GPU"]:
        counts.append(int(node.get("GPU", 0)) * int(1 / gpu + 1e-6))
    return min(counts, default=0)

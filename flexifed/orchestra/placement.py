"""How many clients an actor hosts, which resources it asks for, and whether the cluster could ever hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from flexifed.config import CellConfig, PlacementOptions
from flexifed.errors import ResourceError
from flexifed.federation.assignment import assign_clients
from flexifed.wording import counted

DEFAULT_GPUS_PER_CLIENT = 0.125
_SHARES_OF_A_GPU = 10_000
"""Ray counts GPUs in ten-thousandths."""
_LEAST_SHARE = 1 / _SHARES_OF_A_GPU
Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class CellPlacement:
    """The actors of one cell: the clients of each, how many of them overlap, and the resources that each asks for."""

    clients: tuple[tuple[int, ...], ...]
    cpus_per_actor: float
    gpus_per_actor: float
    streams: int = 1
    cuda_ipc: bool = True

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The placement group's bundles: an empty one for the driver, which only aggregates, then one per actor."""
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
        ConfigError: `clients_per_actor` would split blocks of `reduce_block` clients.
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
    clients = _clients_by_actor(config, options, nodes)
    most = max(map(len, clients))
    gpus_per_actor = _gpus_per_actor(config, options, nodes, clients)
    if gpus_per_actor > 1 and _num_gpus(nodes):
        raise ResourceError(
            f"an actor of {counted(most, 'client')} asks for {gpus_per_actor:g} GPUs, but a process computes on one: "
            f"lower --gpus-per-client to at most {largest_gpu_share(most):g}"
        )
    placement = CellPlacement(
        clients=tuple(clients),
        cpus_per_actor=config.numerics.threads,
        gpus_per_actor=gpus_per_actor,
        streams=min(options.streams, most),
        cuda_ipc=options.cuda_ipc,
    )
    placement = _with_cpus(placement, config.numerics.threads, nodes)
    return placement if holds(nodes, placement) else _refuse(placement, nodes)


def how_many_fit(needed: float, available: float = 1.0) -> int:
    """How many processes that each need this much of a resource fit into what is available; by default, on one GPU.

    >>> how_many_fit(0.3333), how_many_fit(0.1, 0.3)
    (3, 3)
    """
    return int(available / needed + 1e-6)  # 0.3 / 0.1 is 2.9999999999999996


def largest_gpu_share(count: int) -> float:
    """The largest share of a GPU, in Ray's steps, that `count` processes can each have of it.

    >>> largest_gpu_share(3)
    0.3333
    """
    return math.floor(_SHARES_OF_A_GPU / count) / _SHARES_OF_A_GPU


def _clients_by_actor(
    config: CellConfig, options: PlacementOptions, nodes: Sequence[Resources]
) -> Sequence[tuple[int, ...]]:
    """The clients of each actor; see `PlacementOptions`."""
    num_clients, block = config.partition.num_clients, config.sharing.reduce_block
    per_actor = options.clients_per_actor
    if per_actor is None:
        if options.gpus_per_client or config.device == "cuda":
            wanted = options.streams
            if options.gpus_per_client is None:
                share = min(1.0, DEFAULT_GPUS_PER_CLIENT * options.streams)
                places = _num_gpus(nodes) * how_many_fit(share)
                wanted = max(wanted, math.ceil(num_clients / places)) if places else wanted
        else:
            total_cpus = sum(node.get("CPU", 0) for node in nodes)
            wanted = math.ceil(num_clients / max(1, int(total_cpus) // config.numerics.threads))
        per_actor = block * math.ceil(wanted / block)
    return assign_clients(config.client_versions, per_actor, block)


def _gpus_per_actor(
    config: CellConfig, options: PlacementOptions, nodes: Sequence[Resources], clients: Sequence[tuple[int, ...]]
) -> float:
    """The sum of the largest actor's clients' shares; by default no more than the nodes have for every actor."""
    most = max(map(len, clients))
    if options.gpus_per_client is not None:
        return round(options.gpus_per_client * most, 4)
    if config.device == "cpu":
        return 0.0
    share = round(min(1.0, DEFAULT_GPUS_PER_CLIENT * most), 4)
    if gpus := _num_gpus(nodes):
        share = min(share, largest_gpu_share(math.ceil(len(clients) / gpus)))
    return max(share, _LEAST_SHARE)


def _num_gpus(nodes: Sequence[Resources]) -> int:
    """The GPUs of nodes that also have CPUs, which every actor asks for."""
    return sum(int(node.get("GPU", 0)) for node in nodes if node.get("CPU", 0))


def holds(nodes: Sequence[Resources], placement: CellPlacement) -> bool:
    """Whether the nodes could hold a cell's actors, with nothing else on them."""
    return _max_actors(placement, nodes) >= len(placement.clients)


def roomier_placement(placement: CellPlacement, config: CellConfig, nodes: Sequence[Resources]) -> CellPlacement | None:
    """Place a cell with half as many clients at a time on a GPU, which changes no result.

    If an actor's clients overlap, half as many of them do. Otherwise half as many actors share a GPU, each with twice
    the share of it, whichever cells they belong to; if the nodes can't hold as many actors as before, fewer actors host
    more clients each.

    Returns:
        The placement; None if an actor has a GPU to itself already, or none, and its clients take turns.
    """
    if placement.streams > 1:
        return replace(placement, streams=placement.streams // 2)
    sharing = how_many_fit(placement.gpus_per_actor) if placement.gpus_per_actor else 0
    if sharing < 2:
        return None
    roomier = replace(placement, gpus_per_actor=largest_gpu_share(sharing // 2))
    num_clients, block = config.partition.num_clients, config.sharing.reduce_block
    wanted = max(max(map(len, placement.clients)), math.ceil(num_clients / max(1, _max_actors(roomier, nodes))))
    clients = assign_clients(config.client_versions, block * math.ceil(wanted / block), block)
    return _with_cpus(replace(roomier, clients=tuple(clients)), config.numerics.threads, nodes)


def memory_advice(placement: CellPlacement, config: CellConfig, roomier: CellPlacement | None) -> str:
    """Say how many of a cell's clients shared a GPU that was full, and which options give each more of it.

    Args:
        placement: of the cell that ran out of memory.
        config: the cell.
        roomier: see `roomier_placement`.
    """
    sharing = how_many_fit(placement.gpus_per_actor) if placement.gpus_per_actor else 1
    sharing = min(sharing, len(placement.clients))
    together = min(sharing * max(map(len, placement.clients)), config.partition.num_clients)
    problem = (
        f"a GPU had {'up to ' if together > 1 else ''}{counted(together, 'client')} of this cell, "
        f"in {counted(sharing, 'process')}"
    )
    if roomier is None:
        return f"{problem}; use a smaller --width or --batch-size"
    most, block = max(map(len, roomier.clients)), config.sharing.reduce_block
    per_actor = block * math.ceil(most / block)
    streams = f" --streams {roomier.streams}" if config.device == "cuda" and most > 1 else ""
    return (
        f"{problem}; ask for --gpus-per-client {roomier.gpus_per_actor / most:g} --clients-per-actor {per_actor}"
        f"{streams}, or let --retry-out-of-memory do so"
    )


def _with_cpus(placement: CellPlacement, threads: int, nodes: Sequence[Resources]) -> CellPlacement:
    """The placement with as many CPUs for each actor as the nodes can hold; with the fewest, if they hold none."""
    shares = _cpu_shares(len(placement.clients), threads, nodes)
    placements = [replace(placement, cpus_per_actor=share) for share in shares]
    return next((candidate for candidate in placements if holds(nodes, candidate)), placements[-1])


def _cpu_shares(num_actors: int, threads: int, nodes: Sequence[Resources]) -> list[float]:
    """CPUs that an actor may ask for, largest first: one per thread, or a node's CPUs divided among some actors."""
    parts = {node.get("CPU", 0) / count for node in nodes for count in range(1, num_actors + 1)}
    shares = {math.floor(min(threads, part) * 1000) / 1000 for part in parts}
    return sorted((share for share in shares if share > 0), reverse=True) or [0.0]


def _max_actors(placement: CellPlacement, nodes: Sequence[Resources]) -> int:
    """How many actors like these the nodes hold with nothing else on them."""
    return sum(_max_actors_on(node, placement) for node in nodes)


def _refuse(placement: CellPlacement, nodes: Sequence[Resources]) -> NoReturn:
    """Raise an error about a placement for which Ray would wait silently and for ever."""
    have = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
    gpus, per_gpu = _num_gpus(nodes), how_many_fit(placement.gpus_per_actor) if placement.gpus_per_actor else 0
    if not any(node.get("CPU", 0) for node in nodes):
        remedy = "no node has CPUs, so add nodes that have"
    elif placement.gpus_per_actor and not gpus:
        remedy = (
            "no node has a GPU beside CPUs, so use --device cpu without --gpus-per-client or --streams, or add nodes "
            "that have one"
        )
    elif per_gpu and gpus * per_gpu < len(placement.clients):
        remedy = f"leave --gpus-per-client out{_lower_share(placement, gpus)}, or add nodes"
    else:
        remedy = "raise --clients-per-actor, or add nodes"
    raise ResourceError(
        f"a cell needs {placement}, but the cluster could hold only {_max_actors(placement, nodes)} of them with "
        f"nothing else running (its nodes: {have}): {remedy}"
    )


def _lower_share(placement: CellPlacement, gpus: int) -> str:
    """Name a share that clients could ask for instead of the default; nothing if it is below what Ray counts."""
    clients_per_gpu = math.ceil(len(placement.clients) / gpus) * max(map(len, placement.clients))
    share = largest_gpu_share(clients_per_gpu)
    return f", or lower it to {share:g}" if share else ""


def _max_actors_on(node: Resources, placement: CellPlacement) -> int:
    """How many actors an empty node holds. An actor's share lies on one GPU, so shares fill GPUs one by one."""
    counts = []
    if placement.cpus_per_actor:
        counts.append(how_many_fit(placement.cpus_per_actor, node.get("CPU", 0)))
    if placement.gpus_per_actor:
        counts.append(int(node.get("GPU", 0)) * how_many_fit(placement.gpus_per_actor))
    return min(counts, default=0)

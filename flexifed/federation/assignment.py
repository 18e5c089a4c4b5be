"""Which clients live together in one process."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from flexifed.config import NUM_VERSIONS
from flexifed.core.aggregate import blocks_of
from flexifed.errors import ConfigError

_MOST_NAMED = 8
Blocks = Sequence[Sequence[int]]


def assign_clients(num_clients: int, clients_per_host: int, reduce_block: int) -> list[tuple[int, ...]]:
    """Deal clients to hosts: whole blocks, so that all hosts finish a round at about the same time.

    Clients of one architecture stay together where no host has to work longer for it: what only they share is then
    averaged where they live, and does not travel.

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
    num_hosts = -(-len(blocks) // most)
    alike: dict[frozenset[int], list[Sequence[int]]] = {}
    for block in blocks:
        alike.setdefault(frozenset(map(_version, block)), []).append(block)
    hosts = _deal([[block] for block in blocks], num_hosts, most)
    together = _deal(list(alike.values()), num_hosts, most)
    if together and all(together) and max(map(_cost, together)) <= max(map(_cost, hosts)):
        hosts = together
    return sorted(tuple(sorted(client for block in held for client in block)) for held in hosts)


def _deal(units: Sequence[Blocks], num_hosts: int, most: int) -> list[list[Sequence[int]]]:
    """Deal out units of blocks, those with the most to do first, each to the host that has the least to do.

    That is Graham's longest processing time rule, but a host takes a unit only if it then has at most `most` blocks.

    Returns:
        The blocks of each host; an empty list, if a unit found no room.
    """
    hosts: list[list[Sequence[int]]] = [[] for _ in range(num_hosts)]
    with_room = [(0, 0, host) for host in range(num_hosts)]  # cost, number of blocks, which host
    for unit in sorted(units, key=_cost, reverse=True):
        too_small = []
        while with_room and with_room[0][1] + len(unit) > most:
            too_small.append(heappop(with_room))
        if not with_room:
            return []
        cost, held, host = heappop(with_room)
        hosts[host] += unit
        for one in [*too_small, (cost + _cost(unit), held + len(unit), host)]:
            if one[1] < most:
                heappush(with_room, one)
    return hosts


def _version(client: int) -> int:
    return client % NUM_VERSIONS


def _cost(blocks: Blocks) -> int:
    """A version's number stands for its cost, since a family's versions go from the shallowest to the deepest."""
    return sum(_version(client) + 1 for block in blocks for client in block)


def name_clients(clients: Sequence[int]) -> str:
    """Words for the clients of a host: `client 3`, `clients 0 to 3`, or `clients 0, 3, 4 and 12 more`."""
    if len(clients) == 1:
        return f"client {clients[0]}"
    if clients[-1] - clients[0] == len(clients) - 1:
        return f"clients {clients[0]} to {clients[-1]}"
    shown = ", ".join(map(str, clients[:_MOST_NAMED]))
    return f"clients {shown}" + (f" and {len(clients) - _MOST_NAMED} more" if len(clients) > _MOST_NAMED else "")

"""Which clients live together in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from flexifed.core.aggregate import blocks_of
from flexifed.errors import ConfigError

_MOST_NAMED = 8
Blocks = Sequence[Sequence[int]]


def assign_clients(depths: Sequence[int], clients_per_host: int, reduce_block: int) -> list[tuple[int, ...]]:
    """Assign clients to hosts in whole blocks, so that all hosts finish a round at about the same time.

    Clients of one depth stay together where that gives no host more work: layers that only they share are then averaged
    in their own process and need not be sent.

    Args:
        depths: for each client the index of its version, from 0 for the shallowest; `depth + 1` stands for the
            client's cost.
        clients_per_host: the largest number of clients in one host.
        reduce_block: number of consecutive clients whose sum is formed in one process.

    Returns:
        The clients of each host, ascending, at most `clients_per_host`; hosts are in the order of their first client.

    Raises:
        ConfigError: hosts of `clients_per_host` clients would divide a block.
    """
    if clients_per_host < len(depths) and clients_per_host % reduce_block:
        raise ConfigError(
            f"clients_per_actor is {clients_per_host}, not a multiple of reduce_block ({reduce_block}); all clients of "
            f"a block live in one process: use {reduce_block * -(-clients_per_host // reduce_block)} clients per actor"
        )

    def cost(blocks: Blocks) -> int:
        return sum(depths[client] + 1 for block in blocks for client in block)

    blocks = blocks_of(range(len(depths)), reduce_block)
    blocks_per_host = -(-clients_per_host // reduce_block)
    num_hosts = -(-len(blocks) // blocks_per_host)
    by_depths: dict[frozenset[int], list[Sequence[int]]] = {}
    for block in blocks:
        by_depths.setdefault(frozenset(depths[client] for client in block), []).append(block)
    hosts = _deal([[block] for block in blocks], cost, num_hosts, blocks_per_host)
    grouped = _deal(list(by_depths.values()), cost, num_hosts, blocks_per_host)
    if grouped and all(grouped) and max(map(cost, grouped)) <= max(map(cost, hosts)):
        hosts = grouped
    return sorted(tuple(sorted(client for block in host for client in block)) for host in hosts)


def _deal(
    units: Sequence[Blocks], cost: Callable[[Blocks], int], num_hosts: int, blocks_per_host: int
) -> list[list[Sequence[int]]]:
    """Deal units of blocks to hosts, the costliest first, each to the host with the lowest cost so far.

    This is Graham's longest processing time rule, except that a host never gets more than `blocks_per_host` blocks.

    Returns:
        The blocks of each host, or an empty list if no host has room for a unit.
    """
    hosts: list[list[Sequence[int]]] = [[] for _ in range(num_hosts)]
    with_room = [(0, 0, host) for host in range(num_hosts)]  # a heap of (cost, number of blocks, host)
    for unit in sorted(units, key=cost, reverse=True):
        too_full = []
        while with_room and with_room[0][1] + len(unit) > blocks_per_host:
            too_full.append(heappop(with_room))
        if not with_room:
            return []
        host_cost, num_blocks, host = heappop(with_room)
        hosts[host] += unit
        for entry in [*too_full, (host_cost + cost(unit), num_blocks + len(unit), host)]:
            if entry[1] < blocks_per_host:
                heappush(with_room, entry)
    return hosts


def name_clients(clients: Sequence[int]) -> str:
    """Name the clients of a host: `client 3`, `clients 0 to 3`, or `clients 0, 3, 4 and 12 more`."""
    if len(clients) == 1:
        return f"client {clients[0]}"
    if clients[-1] - clients[0] == len(clients) - 1:
        return f"clients {clients[0]} to {clients[-1]}"
    shown = ", ".join(map(str, clients[:_MOST_NAMED]))
    return f"clients {shown}" + (f" and {len(clients) - _MOST_NAMED} more" if len(clients) > _MOST_NAMED else "")

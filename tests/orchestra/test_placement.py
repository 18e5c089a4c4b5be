"""How a cell's clients are distributed over actors, and which placements a cluster could never hold."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from flexifed.config import CellConfig, Device, NumericsConfig, PartitionConfig, PlacementOptions, SharingConfig
from flexifed.errors import ConfigError, ResourceError
from flexifed.orchestra.placement import (
    CellPlacement,
    holds,
    memory_advice,
    place_cell,
    roomier_placement,
)

Nodes = list[dict[str, float]]
COUNT = "a whole number of at least 1 and at most 2147483647"


def cell(num_clients: int = 8, *, device: Device = "cpu", threads: int = 1, reduce_block: int = 1) -> CellConfig:
    return CellConfig(
        dataset="cifar10",
        family="vgg",
        scheme="max_common",
        device=device,
        partition=PartitionConfig(num_clients=num_clients, num_shards=num_clients),
        numerics=NumericsConfig(threads=threads),
        sharing=SharingConfig(reduce_block=reduce_block),
    )


def place(config: CellConfig, nodes: Nodes, **options: Any) -> CellPlacement:
    return place_cell(config, PlacementOptions(**options), nodes)


def shape(placement: CellPlacement) -> tuple[list[int], float, float]:
    """The actors' numbers of clients, largest first, and the resources that an actor asks for."""
    counts = sorted((len(clients) for clients in placement.clients), reverse=True)
    return counts, placement.cpus_per_actor, placement.gpus_per_actor


@pytest.mark.parametrize(
    ("num_clients", "threads", "cpus", "expected"),
    [
        (8, 1, 2, ([4, 4], 1.0, 0.0)),
        (40, 1, 2, ([20, 20], 1.0, 0.0)),
        (400, 1, 2, ([200, 200], 1.0, 0.0)),
        (8, 1, 3, ([3, 3, 2], 1.0, 0.0)),
        (8, 1, 64, ([1] * 8, 1.0, 0.0)),
        (8, 2, 4, ([4, 4], 2.0, 0.0)),
        (8, 4, 2, ([8], 2.0, 0.0)),
        (1, 1, 2, ([1], 1.0, 0.0)),
    ],
)
def test_on_cpus_every_cpu_gets_one_actor(
    num_clients: int, threads: int, cpus: int, expected: tuple[list[int], float, float]
) -> None:
    assert shape(place(cell(num_clients, threads=threads), [{"CPU": cpus}])) == expected


def test_eight_clients_share_one_gpu_by_default() -> None:
    placement = place(cell(device="cuda"), [{"CPU": 16, "GPU": 1}])
    assert shape(placement) == ([1] * 8, 1.0, 0.125)
    assert placement.bundles == [{}, *[{"CPU": 1.0, "GPU": 0.125}] * 8]
    assert str(placement) == "8 actors of 1 client, each 1 CPU and 0.125 GPU"


@pytest.mark.parametrize(
    ("num_clients", "gpus", "streams", "expected"),
    [
        (40, 1, 1, ([5] * 8, 1.0, 0.125)),
        (40, 4, 1, ([2] * 20, 0.8, 0.2)),
        (40, 1, 8, ([40], 1.0, 1.0)),
        (40, 2, 8, ([20, 20], 1.0, 1.0)),
        (8, 1, 3, ([4, 4], 1.0, 0.5)),
        (20, 1, 16, ([20], 1.0, 1.0)),
    ],
)
def test_clients_that_the_gpus_cannot_hold_at_once_take_turns(
    num_clients: int, gpus: int, streams: int, expected: tuple[list[int], float, float]
) -> None:
    nodes = [{"CPU": 16.0, "GPU": float(gpus)}]
    placement = place(cell(num_clients, device="cuda"), nodes, streams=streams)
    assert shape(placement) == expected
    assert placement.streams == streams


@given(
    num_clients=st.integers(1, 200),
    gpus=st.lists(st.integers(0, 8), min_size=1, max_size=4).filter(any),
    streams=st.integers(1, 20),
    block=st.integers(1, 6),
)
def test_by_default_every_cell_finds_room_on_whatever_gpus_there_are(
    num_clients: int, gpus: list[int], streams: int, block: int
) -> None:
    nodes = [{"CPU": 64.0, "GPU": float(count)} for count in gpus]
    placement = place(cell(num_clients, device="cuda", reduce_block=block), nodes, streams=streams)
    assert holds(nodes, placement)
    assert sorted(client for clients in placement.clients for client in clients) == list(range(num_clients))


def test_the_default_number_of_clients_in_an_actor_can_also_be_asked_for() -> None:
    config, nodes = cell(40, device="cuda"), [{"CPU": 16.0, "GPU": 1.0}]
    assert place(config, nodes, clients_per_actor=5) == place(config, nodes)


def test_gpus_of_a_node_without_cpus_do_not_count() -> None:
    nodes = [{"CPU": 16.0, "GPU": 1.0}, {"CPU": 0.0, "GPU": 4.0}]
    assert shape(place(cell(40, device="cuda"), nodes)) == ([5] * 8, 1.0, 0.125)


def test_half_a_gpu_beyond_whole_ones_does_not_count() -> None:
    assert shape(place(cell(40, device="cuda"), [{"CPU": 16.0, "GPU": 1.5}] * 2)) == ([3] * 12 + [2] * 2, 1.0, 0.1428)


def test_clients_of_an_actor_overlap_up_to_the_number_of_streams() -> None:
    nodes = [{"CPU": 16, "GPU": 1}]
    placement = place(cell(device="cuda"), nodes, streams=4)
    assert placement.streams == 4
    assert str(placement) == "2 actors of up to 4 clients, 4 at a time, each 1 CPU and 0.5 GPU"
    assert place(cell(device="cuda"), nodes, streams=4, clients_per_actor=2).streams == 2


def test_a_full_gpu_has_fewer_streams_before_it_has_fewer_actors() -> None:
    config, nodes = cell(device="cuda"), [{"CPU": 16, "GPU": 1}]
    placement = place(config, nodes, streams=3, clients_per_actor=4)
    roomier = roomier_placement(placement, config, nodes)
    assert roomier == replace(placement, streams=1)
    roomiest = roomier_placement(roomier, config, nodes)
    assert roomiest is not None
    assert shape(roomiest) == ([8], 1.0, 1.0)


@pytest.mark.parametrize(
    "options", [{}, {"streams": 8}, {"streams": 4}, {"streams": 3, "clients_per_actor": 4}, {"gpus_per_client": 0.25}]
)
@pytest.mark.parametrize("gpus", [1, 4])
def test_the_advice_after_a_full_gpu_asks_for_what_a_retry_gets(options: dict[str, Any], gpus: int) -> None:
    config, nodes = cell(device="cuda"), [{"CPU": 16, "GPU": gpus}]
    try:
        placement = place(config, nodes, **options)
    except ResourceError:
        assert (options, gpus) == ({"gpus_per_client": 0.25}, 1)
        return
    roomier = roomier_placement(placement, config, nodes)
    assert roomier is not None
    assert place(config, nodes, **advised_options(memory_advice(placement, config, roomier))) == roomier


def advised_options(text: str) -> dict[str, Any]:
    """The options that a piece of advice names."""
    options = re.findall(r"--(gpus-per-client|clients-per-actor|streams) ([\d.]+)", text)
    return {name.replace("-", "_"): float(value) if "gpus" in name else int(value) for name, value in options}


@pytest.mark.parametrize(
    ("num_clients", "options", "start"),
    [
        (9, {}, "a GPU had up to 9 clients of this cell, in 5 processes; ask for --gpus-per-client 0.1 "),
        (
            8,
            {"gpus_per_client": 0.125, "clients_per_actor": 8},
            "a GPU had up to 8 clients of this cell, in 1 process;",
        ),
        (1, {"gpus_per_client": 1}, "a GPU had 1 client of this cell, in 1 process; use a smaller --width"),
    ],
)
def test_the_advice_counts_no_more_clients_than_the_cell_has(
    num_clients: int, options: dict[str, Any], start: str
) -> None:
    config, nodes = cell(num_clients, device="cuda"), [{"CPU": 16.0, "GPU": 2.0 if options else 1.0}]
    placement = place(config, nodes, **options)
    roomier = roomier_placement(placement, config, nodes)
    assert memory_advice(placement, config, roomier).startswith(start)


def test_actors_on_gpus_share_cpus_that_are_too_few() -> None:
    assert shape(place(cell(device="cuda"), [{"CPU": 2, "GPU": 1}])) == ([1] * 8, 0.25, 0.125)


def test_cpu_clients_can_be_given_a_share_of_a_gpu() -> None:
    assert shape(place(cell(), [{"CPU": 8, "GPU": 1}], gpus_per_client=0.125)) == ([1] * 8, 1.0, 0.125)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clients_per_actor": 3}, ([3, 3, 2], 1.0, 0.375)),
        ({"clients_per_actor": 8}, ([8], 1.0, 1.0)),
        ({"clients_per_actor": 100}, ([8], 1.0, 1.0)),
        ({"gpus_per_client": 0.25}, ([1] * 8, 1.0, 0.25)),
        ({"gpus_per_client": 0.25, "clients_per_actor": 4}, ([4, 4], 1.0, 1.0)),
        ({"streams": 4}, ([4, 4], 1.0, 0.5)),
    ],
)
def test_the_users_options_override_the_defaults(
    options: dict[str, float], expected: tuple[list[int], float, float]
) -> None:
    assert shape(place(cell(device="cuda"), [{"CPU": 16, "GPU": 4}], **options)) == expected


def test_actors_are_spread_over_several_nodes() -> None:
    assert shape(place(cell(16), [{"CPU": 4}, {"CPU": 4}])) == ([2] * 8, 1.0, 0.0)
    assert shape(place(cell(16, device="cuda"), [{"CPU": 8, "GPU": 1}] * 2)) == ([1] * 16, 1.0, 0.125)


def test_blocks_decide_the_default_number_of_clients_in_an_actor() -> None:
    assert shape(place(cell(8, reduce_block=3), [{"CPU": 2}])) == ([6, 2], 1.0, 0.0)
    assert shape(place(cell(8, device="cuda", reduce_block=4), [{"CPU": 2, "GPU": 1}])) == ([4, 4], 1.0, 0.5)


def test_actors_that_would_cut_a_block_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"clients_per_actor is 3, not a multiple of reduce_block \(2\).*use 4 clients"
    ):
        place(cell(reduce_block=2), [{"CPU": 8}], clients_per_actor=3)


@pytest.mark.parametrize(
    ("config", "nodes", "options", "expected_parts"),
    [
        (
            cell(device="cuda"),
            [{"CPU": 4}],
            {},
            ["8 actors of 1 client, each 0.5 CPU and 0.125 GPU", "hold only 0", "4 CPU, 0 GPU", "add nodes"],
        ),
        (
            cell(device="cuda"),
            [{"CPU": 4, "GPU": 1}, {"CPU": 4}],
            {"gpus_per_client": 0.5},
            ["0.5 GPU", "hold only 2", "4 CPU, 1 GPU; 4 CPU, 0 GPU", "lower it to 0.125"],
        ),
        (
            cell(device="cuda"),
            [{"CPU": 16, "GPU": 3}],  # a fraction lies on one GPU: each holds one of 0.6
            {"gpus_per_client": 0.6},
            ["0.6 GPU", "hold only 3", "16 CPU, 3 GPU", "lower it to 0.3333"],
        ),
        (
            cell(device="cuda"),
            [{"CPU": 8, "GPU": 8}],
            {"gpus_per_client": 2},
            ["an actor of 1 client asks for 2 GPUs", "on one: lower --gpus-per-client to at most 1"],
        ),
        (
            cell(device="cuda"),
            [{"CPU": 8, "GPU": 8}],
            {"gpus_per_client": 0.3, "clients_per_actor": 4},
            ["an actor of 4 clients asks for 1.2 GPUs", "on one: lower --gpus-per-client to at most 0.25"],
        ),
        (
            cell(device="cuda", reduce_block=4),
            [{"CPU": 8}],
            {"gpus_per_client": 0.6},
            ["2 actors of up to 4 clients", "hold only 0", "no node has a GPU beside CPUs", "--device cpu"],
        ),
        (
            cell(40, device="cuda"),
            [{"CPU": 16, "GPU": 1}],
            {"gpus_per_client": 0.125},
            ["hold only 8", ": leave --gpus-per-client out, or lower it to 0.025, or add nodes"],
        ),
        (
            cell(200, device="cuda"),
            [{"CPU": 16, "GPU": 1}],
            {"gpus_per_client": 0.0051, "clients_per_actor": 1},
            ["hold only 196", "lower it to 0.005,"],
        ),
        (
            cell(40, device="cuda"),
            [{"CPU": 1, "GPU": 0}, {"CPU": 0, "GPU": 8}],
            {"gpus_per_client": 0.1},
            ["hold only 0", "no node has a GPU beside CPUs", "--device cpu"],
        ),
        (
            cell(device="cuda"),
            [{"CPU": 16}],
            {"clients_per_actor": 8},
            ["each 1 CPU and 1 GPU", "no node has a GPU beside CPUs", "--device cpu"],
        ),
        (
            cell(device="cuda"),
            [{"CPU": 8, "GPU": 1}],
            {"gpus_per_client": 0},
            ["device is 'cuda' but gpus_per_client is 0", "--device cpu"],
        ),
        (
            cell(device="cuda"),
            [{"CPU": 8, "GPU": 1}],
            {"gpus_per_client": 1e-5},
            ["device is 'cuda' but gpus_per_client is 1e-05", "at least 0.0001", "--device cpu"],
        ),
        (cell(4000), [{"CPU": 3}], {"clients_per_actor": 1}, ["hold only 3000", "raise --clients-per-actor"]),
        (cell(), [{"CPU": 8}], {"streams": 2}, ["streams is 2, but device is 'cpu'", "leave --streams out"]),
        (cell(), [{"CPU": 0}], {}, ["hold only 0", "0 CPU, 0 GPU", "no node has CPUs, so add nodes"]),
        (cell(), [], {}, ["hold only 0", "no node has CPUs"]),
    ],
)
def test_a_placement_that_could_never_fit_is_refused_with_numbers_and_remedy(
    config: CellConfig, nodes: Nodes, options: dict[str, float], expected_parts: list[str]
) -> None:
    with pytest.raises(ResourceError) as caught:
        place(config, nodes, **options)
    assert [part for part in expected_parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("gpus_per_client", -0.5, "gpus_per_client is -0.5; it must be a finite number at least 0"),
        ("gpus_per_client", float("nan"), "gpus_per_client is nan; it must be a finite number at least 0"),
        ("gpus_per_client", float("inf"), "gpus_per_client is inf; it must be a finite number at least 0"),
        (
            "clients_per_actor",
            0,
            "clients_per_actor is 0; it must be a whole number of at least 1 and at most 2147483647",
        ),
        ("streams", 0, "streams is 0; it must be a whole number of at least 1 and at most 2147483647"),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PlacementOptions(**{option: value})
    assert str(caught.value) == message


NODES = st.lists(
    st.fixed_dictionaries(
        {"CPU": st.integers(1, 96).map(float) | st.sampled_from([0, 0.5, 3.25])},
        optional={"GPU": st.integers(1, 8).map(float), "memory": st.just(1e9)},
    ),
    min_size=1,
    max_size=4,
)
SHARES = st.sampled_from([0, 0.01, 0.1, 0.125, 1 / 6, 0.25, 0.3, 1 / 3, 0.6, 1, 2]) | st.floats(1e-3, 0.5)


@given(
    num_clients=st.integers(1, 60),
    device=st.sampled_from(["cpu", "cuda"]),
    threads=st.integers(1, 4),
    reduce_block=st.sampled_from([1, 1, 2, 5]),
    nodes=NODES,
    gpus_per_client=st.none() | SHARES,
    clients_per_actor=st.none() | st.integers(1, 40),
)
@settings(max_examples=300)
def test_an_accepted_placement_covers_clients_once_in_whole_blocks_and_fits_node_by_node(
    num_clients: int,
    device: Device,
    threads: int,
    reduce_block: int,
    nodes: Nodes,
    gpus_per_client: float | None,
    clients_per_actor: int | None,
) -> None:
    config = cell(num_clients, device=device, threads=threads, reduce_block=reduce_block)
    try:
        placement = place(config, nodes, gpus_per_client=gpus_per_client, clients_per_actor=clients_per_actor)
    except (ResourceError, ConfigError) as error:
        event(type(error).__name__)
        return
    event("accepted")
    assert sorted(client for clients in placement.clients for client in clients) == [*range(num_clients)]
    blocks = [{client // reduce_block for client in clients} for clients in placement.clients]
    assert sum(map(len, blocks)) == len(set.union(*blocks))
    assert len(placement.bundles) == len(placement.clients) + 1
    assert placement.cpus_per_actor <= threads
    assert (placement.cpus_per_actor > 0) == any(node["CPU"] for node in nodes)
    assert (placement.gpus_per_actor > 0) or device == "cpu"
    assert packed(placement, nodes) == len(placement.clients)


def packed(placement: CellPlacement, nodes: Nodes) -> int:
    """Count the actors that fit when placed one by one: CPUs anywhere on a node, a fraction of a GPU on one GPU.

    In ten-thousandths, as Ray counts.
    """
    cpu, gpu = (round(share * 10_000) for share in (placement.cpus_per_actor, placement.gpus_per_actor))
    placed = 0
    for node in nodes:
        cpus, gpus = round(node["CPU"] * 10_000), [10_000] * int(node.get("GPU", 0))
        for _ in range(len(placement.clients) - placed):
            needed = gpu // 10_000 if gpu > 10_000 else 1
            free = [index for index, remaining in enumerate(gpus) if remaining >= min(gpu, 10_000)][:needed]
            if cpus < cpu or (gpu and len(free) < needed):
                break
            cpus -= cpu
            for index in free:
                gpus[index] -= min(gpu, 10_000)
            placed += 1
    return placed


@pytest.mark.parametrize(
    ("config", "nodes", "options"),
    [
        pytest.param(cell(16, device="cuda"), [{"CPU": 4, "GPU": 1}] * 3, {}, id="16 eighths of 3 GPUs, 12 CPUs"),
        pytest.param(cell(8, device="cuda"), [{"CPU": 1, "GPU": 1}, {"CPU": 15}], {}, id="GPUs and CPUs lie apart"),
        pytest.param(cell(8, threads=2), [{"CPU": 1}, {"CPU": 3}], {}, id="two threads, odd nodes"),
        pytest.param(cell(4), [{"CPU": 1}] * 3, {"clients_per_actor": 1}, id="4 actors on 3 nodes"),
    ],
)
def test_what_fits_with_a_smaller_share_of_cpus_is_not_refused(
    config: CellConfig, nodes: Nodes, options: dict[str, int]
) -> None:
    placement = place(config, nodes, **options)
    assert packed(placement, nodes) == len(placement.clients)


@pytest.mark.parametrize(
    ("gpus", "options", "expected"),
    [
        (1, {}, ([2] * 4, 1.0, 0.25)),  # eight on one GPU become four that host two clients each
        (4, {}, ([1] * 8, 1.0, 0.25)),  # with more GPUs they only spread
        (1, {"gpus_per_client": 0.125, "clients_per_actor": 4}, ([8], 1.0, 1.0)),
        (1, {"gpus_per_client": 0.3, "clients_per_actor": 3}, None),  # one actor per GPU already
        (1, {"gpus_per_client": 0.33, "clients_per_actor": 1}, None),  # does not fit to begin with
    ],
)
def test_half_as_many_actors_share_a_gpu(
    gpus: int, options: dict[str, Any], expected: tuple[list[int], float, float] | None
) -> None:
    config, nodes = cell(device="cuda"), [{"CPU": 16, "GPU": gpus}]
    try:
        placement = place(config, nodes, **options)
    except ResourceError:
        assert expected is None
        return
    roomier = roomier_placement(placement, config, nodes)
    assert (shape(roomier) if roomier else None) == expected


@example(num_clients=37, share=0.05, per_actor=2, gpus=2, block=2, streams=1)  # a short last block, in the first host
@example(num_clients=16, share=0.05, per_actor=18, gpus=3, block=3, streams=2)
@example(num_clients=97, share=0.1, per_actor=5, gpus=3, block=1, streams=1)
@example(num_clients=65, share=0.05, per_actor=1, gpus=4, block=1, streams=1)  # more actors than CPUs, then fewer
@example(num_clients=16, share=0.0625, per_actor=1, gpus=1, block=1, streams=2)  # no actor has clients to overlap
@given(
    num_clients=st.integers(1, 100),
    share=st.sampled_from([1.0, 0.5, 0.3333, 0.3, 0.25, 0.2, 0.125, 0.1, 0.0625, 0.05]),
    per_actor=st.integers(1, 20),
    gpus=st.integers(1, 4),
    block=st.sampled_from([1, 2, 3, 4]),
    streams=st.integers(1, 5),
)
@settings(max_examples=400, deadline=None)
def test_halving_ends_at_one_actor_a_gpu_always_fits_and_leaves_no_gpu_idle(
    num_clients: int, share: float, per_actor: int, gpus: int, block: int, streams: int
) -> None:
    config = cell(num_clients, device="cuda", reduce_block=block)
    nodes = [{"CPU": 64.0, "GPU": float(gpus)}]
    options = {"gpus_per_client": share, "clients_per_actor": per_actor, "streams": streams}
    try:
        placement: CellPlacement | None = place(config, nodes, **options)
    except (ResourceError, ConfigError):
        event("refused")
        return
    steps = 0
    while placement is not None:
        assert holds(nodes, placement)
        assert sorted(client for actor in placement.clients for client in actor) == list(range(num_clients))
        actors_per_gpu = int(1 / placement.gpus_per_actor + 1e-6)
        roomier = roomier_placement(placement, config, nodes)
        assert (roomier is None) == (actors_per_gpu < 2 and placement.streams == 1)
        if roomier is not None:
            advised = advised_options(memory_advice(placement, config, roomier))
            assert place(config, nodes, **advised) == roomier
            assert place(config, nodes, **options | advised) == roomier  # also when added to the original options
            if placement.streams == 1:
                assert int(1 / roomier.gpus_per_actor + 1e-6) == actors_per_gpu // 2
                before, after = (max(map(len, actors)) for actors in (placement.clients, roomier.clients))
                blocks_per_actor = math.ceil(math.ceil(num_clients / block) / (gpus * (actors_per_gpu // 2)))
                assert after <= max(block * math.ceil(before / block), block * blocks_per_actor)
        placement, steps = roomier, steps + 1
    assert steps <= 10


@given(
    num_clients=st.integers(1, 100),
    share=st.integers(1, 10_000).map(lambda part: part / 10_000),
    per_actor=st.none() | st.integers(1, 20),
    gpus=st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_a_request_for_too_much_of_the_gpus_is_refused_with_a_share_that_fits(
    num_clients: int, share: float, per_actor: int | None, gpus: list[int]
) -> None:
    config, nodes = cell(num_clients, device="cuda"), [{"CPU": 64.0, "GPU": float(count)} for count in gpus]
    try:
        place(config, nodes, gpus_per_client=share, clients_per_actor=per_actor)
    except ResourceError as error:
        remedy = re.search(r"lower it to ([\d.]+),", str(error))
        event("refused with a share" if remedy else "refused")
        if remedy:
            lower = float(remedy.group(1))
            assert lower < share
            place(config, nodes, gpus_per_client=lower, clients_per_actor=per_actor)
        if "leave --gpus-per-client out" in str(error):
            place(config, nodes, clients_per_actor=per_actor)

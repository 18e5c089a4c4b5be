"""One contract for rounds, in process and on real Ray, followed by tests for only one of the two."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import flexifed
from flexifed.config import (
    SCHEMES,
    CellConfig,
    ModelConfig,
    NumericsConfig,
    PartitionConfig,
    PlacementOptions,
    SharingConfig,
    TrainingConfig,
)
from flexifed.core.aggregate import (
    BlockSum,
    GroupState,
    State,
    aggregate,
    apply_group_state,
    shared_tensors,
    sum_block,
)
from flexifed.core.schemes import SharingPlan
from flexifed.data import open_dataset, synthetic
from flexifed.errors import ClientError, ConfigError, DeviceMemoryError, ResultsError
from flexifed.federation import rounds
from flexifed.federation.assignment import assign_clients
from flexifed.federation.cell import ClientShards, cell_plan, make_shards, participants
from flexifed.federation.checkpoint import SHARED, Checkpoint
from flexifed.federation.client import Client, ClientRound
from flexifed.federation.host import HostRound
from flexifed.federation.rounds import Federation, Hosts, LocalHosts, RoundResult
from flexifed.orchestra import cluster
from flexifed.orchestra.actors import ActorHosts
from flexifed.orchestra.lending import lending_on
from flexifed.orchestra.placement import CellPlacement, place_cell
from flexifed.orchestra.wire import ObjectStore, pack, unpack
from flexifed.seeding import numpy_generator
from flexifed.training.numerics import numeric_settings
from flexifed.training.streams import Steps, run_to_end
from flexifed.training.workspace import Workspace

INFO = synthetic.info()
NUM_CLIENTS = 8
VERSIONS = (0, 1, 2, 3, 0, 1, 2, 3)
Backend = Callable[[CellConfig, Sequence[ClientShards], int], Hosts]
"""Makes hosts for a config and its shards, with a given number of clients in each."""
Run = Callable[..., tuple[list[RoundResult], tuple[str, ...]]]
"""Plays two rounds with this many clients in a host, and one that is only scored; returns the states' digests too."""


def cell(scheme: str = "max_common", **changes: Any) -> CellConfig:
    """Eight clients of tiny models, with one batch of 25 images each."""
    partition = PartitionConfig(num_clients=NUM_CLIENTS, num_shards=400, windows_per_shard=5)
    config = CellConfig(dataset="cifar10", family="vgg", scheme=scheme, model=ModelConfig(width=0.03))
    return replace(config, **{"partition": partition, "training": TrainingConfig(local_epochs=1), **changes})


def stop_lending(hosts: ActorHosts) -> None:
    """Make actors that a test may have used through `LendingActors` stop lending."""
    hosts._transport = lending_on(torch.device("cpu"))
    hosts._stop_lending()


class SomeActors(ActorHosts):
    """The first actors of existing hosts, so that a test with fewer actors starts no processes."""

    def __init__(self, whole: ActorHosts, count: int) -> None:
        stop_lending(whole)
        self._group = whole._group
        self._actors = whole._actors[:count]
        self._transport = ObjectStore()


class LendingActors(SomeActors):
    """The same actors, which lend tensors to each other as on a common GPU, here in shared memory."""

    def _choose_exchange(self, config: CellConfig, placement: CellPlacement) -> None:
        """Choose as for clients on a GPU; `_common_gpu` says which."""
        super()._choose_exchange(replace(config, device="cuda"), placement)

    def _common_gpu(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture(scope="module")
def eight_actors() -> Iterator[ActorHosts]:
    """One actor for each client, with an eighth of a fake GPU each."""
    with cluster.connected(None, num_cpus=8, num_gpus=1):
        placement = place_cell(cell(), PlacementOptions(gpus_per_client=0.125, clients_per_actor=1), cluster.nodes())
        group = ray.util.placement_group([bundle for bundle in placement.bundles if bundle])
        ray.get(group.ready())
        hosts = ActorHosts(group)
        yield hosts
        stop_lending(hosts)
        hosts.shut_down()


def in_process(config: CellConfig, shards: Sequence[ClientShards], clients_per_host: int) -> Hosts:
    return LocalHosts(config, INFO, shards, clients_per_host)


def on_ray(
    kind: type[SomeActors],
    actors: ActorHosts,
    config: CellConfig,
    shards: Sequence[ClientShards],
    clients_per_actor: int,
) -> Hosts:
    clients = tuple(assign_clients(config.client_versions, clients_per_actor, config.sharing.reduce_block))
    hosts = kind(actors, len(clients))
    hosts.begin(config, INFO, CellPlacement(clients=clients, cpus_per_actor=1, gpus_per_actor=0), shards)
    expected = "tensors stay on" if kind is LendingActors else "tensors travel"
    if not cell_plan(config, INFO).groups_across(clients):
        expected = "no tensors"
    assert hosts.exchange.startswith(expected), hosts.exchange
    return hosts


ON_RAY = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(
    params=[None, pytest.param(SomeActors, marks=ON_RAY), pytest.param(LendingActors, marks=ON_RAY)],
    ids=["in_process", "ray", "ray_lending"],
    scope="module",
)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param is None:
        return in_process
    return partial(on_ray, request.param, request.getfixturevalue("eight_actors"))


@pytest.fixture(scope="module")
def run(backend: Backend) -> Run:
    """Plays runs on a backend, each only once for all tests that look at it."""
    return cache(partial(play, backend))


def start(config: CellConfig, backend: Backend = in_process, clients_per_host: int = NUM_CLIENTS) -> Federation:
    return Federation(config, INFO, backend(config, make_shards(config, INFO), clients_per_host))


def play(
    backend: Backend, config: CellConfig, clients_per_host: int, rounds: int = 2
) -> tuple[list[RoundResult], tuple[str, ...]]:
    """Play this many rounds of training and one that is only scored; returns the digests of the final states too."""
    federation = start(config, backend, clients_per_host)
    return [federation.play_round(train=index < rounds) for index in range(rounds + 1)], federation.state_sha256()


@cache
def reference(config: CellConfig, rounds: int = 2) -> tuple[list[RoundResult], tuple[str, ...]]:
    """The same run with all clients in one host in this process."""
    return play(in_process, config, NUM_CLIENTS, rounds)


def measured(results: Iterable[RoundResult]) -> list[list[ClientRound]]:
    """The measurements of rounds without their times."""
    return [
        [replace(client, eval_s=0, train_s=None, train_started=None) for client in result.clients] for result in results
    ]


def assert_played_like_the_reference(hosts: Hosts, config: CellConfig) -> None:
    results, digests = play(lambda *_: hosts, config, NUM_CLIENTS)
    assert digests == reference(config)[1]
    assert measured(results) == measured(reference(config)[0])


def assert_like_the_reference(run: Run, config: CellConfig, clients_per_host: int) -> None:
    results, digests = run(config, clients_per_host)
    expected_results, expected_digests = reference(config)
    assert digests == expected_digests
    assert measured(results) == measured(expected_results)
    assigned = assign_clients(config.client_versions, clients_per_host, config.sharing.reduce_block)
    host_of = {client: host for host, clients in enumerate(assigned) for client in clients}
    hosts = tuple(host_of[client] for client in range(NUM_CLIENTS))
    assert [result.host_of for result in results] == [hosts] * 3


# ------------------------------------------------------------------------------------------- in process and on Ray


@pytest.mark.parametrize("clients_per_host", [8, 4, 2, 1])
def test_bits_do_not_depend_on_where_clients_live(run: Run, clients_per_host: int) -> None:
    assert_like_the_reference(run, cell("max_common"), clients_per_host)


@pytest.mark.parametrize(("clients_per_host", "streams"), [(8, 8), (8, 3), (4, 2)])
@pytest.mark.parametrize("reduce_block", [1, 2])
def test_bits_do_not_depend_on_how_many_clients_overlap(clients_per_host: int, streams: int, reduce_block: int) -> None:
    config = cell(sharing=SharingConfig(reduce_block=reduce_block))

    def overlapping(config: CellConfig, shards: Sequence[ClientShards], clients_per_host: int) -> Hosts:
        return LocalHosts(config, INFO, shards, clients_per_host, streams)

    assert_like_the_reference(partial(play, overlapping), config, clients_per_host)


@pytest.mark.parametrize("clients_per_host", [4, 2])
def test_bits_do_not_depend_on_where_whole_blocks_live(run: Run, clients_per_host: int) -> None:
    assert_like_the_reference(run, cell(sharing=SharingConfig(reduce_block=2)), clients_per_host)


def test_a_host_hands_back_one_sum_for_each_of_its_blocks(backend: Backend) -> None:
    config = cell(sharing=SharingConfig(reduce_block=2))
    played = backend(config, make_shards(config, INFO), 4).play_round(0, {}, train=True)
    assert [len(host.blocks) for host in played] == [2, 2]


SHARES_WHOLE_MODELS = {
    "standalone": False,
    "clustered_fl": True,
    "basic_common": False,
    "clustered_common": True,
    "max_common": True,
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_under_any_scheme_bits_agree_and_a_version_is_equal_where_its_whole_model_is_shared(
    run: Run, scheme: str
) -> None:
    assert_like_the_reference(run, cell(scheme), 3)
    _, digests = run(cell(scheme), 3)
    assert [digests[client] == digests[client + 4] for client in range(4)] == [SHARES_WHOLE_MODELS[scheme]] * 4
    assert len(set(digests)) == (4 if SHARES_WHOLE_MODELS[scheme] else 8)


@pytest.mark.parametrize("scheme", ["standalone", "basic_common", "max_common"])
def test_bytes_are_what_the_scheme_makes_a_client_send_and_get(run: Run, scheme: str) -> None:
    plan = cell_plan(cell(scheme), INFO)
    (first, second, last), _ = run(cell(scheme), 3)
    shared = [plan.bytes_per_round(client) for client in range(NUM_CLIENTS)]
    assert any(shared) == (scheme != "standalone")
    assert [client.bytes_down for client in first.clients] == [0] * NUM_CLIENTS
    assert [client.bytes_down for client in second.clients] == [client.bytes_down for client in last.clients] == shared
    assert [client.bytes_up for client in first.clients] == [client.bytes_up for client in second.clients] == shared
    assert [client.bytes_up for client in last.clients] == [0] * NUM_CLIENTS


def test_all_rounds_but_the_last_have_training_fields(run: Run) -> None:
    (first, second, last), _ = run(cell(), 3)
    assert [result.round_index for result in (first, second, last)] == [0, 1, 2]
    assert {(client.train_loss, client.train_s, client.train_started) for client in last.clients} == {
        (None, None, None)
    }
    for client in (*first.clients, *second.clients):
        assert client.train_loss is not None
        assert client.train_s is not None
        assert client.train_started is not None
        assert client.train_loss > 0 < client.train_s


@pytest.mark.parametrize("clients_per_round", [None, 3])
def test_a_short_run_is_the_head_of_a_longer_one(run: Run, clients_per_round: int | None) -> None:
    config = cell(sharing=SharingConfig(clients_per_round=clients_per_round))
    short, digests = run(config, 3)
    longer, later_digests = reference(config, rounds=3)
    assert measured(short[:2]) == measured(longer[:2])
    scores = [
        [(client.accuracy, client.loss, client.bytes_down) for client in result.clients]
        for result in (short[2], longer[2])
    ]
    assert scores[0] == scores[1]
    assert digests != later_digests


def uneven_shards(config: CellConfig) -> list[ClientShards]:
    """Client k has 10 (k + 1) training samples."""
    return [
        ClientShards(shards.train[: 10 * (client + 1)], shards.test)
        for client, shards in enumerate(make_shards(config, INFO))
    ]


@pytest.mark.parametrize("reduce_block", [1, 4])
def test_weighting_by_samples_is_carried_to_the_driver(backend: Backend, reduce_block: int) -> None:
    config = cell(sharing=SharingConfig(weighting="samples", reduce_block=reduce_block))
    shards = uneven_shards(config)
    local = Federation(config, INFO, LocalHosts(config, INFO, shards))
    other = Federation(config, INFO, backend(config, shards, 4))
    for federation in (local, other):
        federation.play_round()
    assert other.state_sha256() == local.state_sha256()


def test_a_clients_error_reaches_the_caller_as_it_was_raised(backend: Backend) -> None:
    config = replace(cell(), training=TrainingConfig(local_epochs=1, batch_size=8, learning_rate=1e30))
    federation = start(config, backend)
    with pytest.raises(ClientError) as caught:
        federation.play_round()
    assert type(caught.value) is ClientError
    assert str(caught.value) == (
        "client 0, round 0, training: the training loss is nan; lower --learning-rate (now 1e+30)"
    )
    assert federation.next_round == 0


@pytest.mark.parametrize("clients_per_host", [4, 1])
def test_clients_resume_from_a_checkpoint_of_other_hosts(
    backend: Backend, tmp_path: Path, clients_per_host: int
) -> None:
    federation = start(cell())
    federation.play_round()
    other = start(cell(), backend, clients_per_host)
    other.restore(saved(federation, tmp_path / "one"))
    assert other.state_sha256() == federation.state_sha256()
    other.play_round()
    federation.restore(saved(other, tmp_path / "two"))
    assert federation.state_sha256() == other.state_sha256() == reference(cell())[1]


FEW = SharingConfig(clients_per_round=3)


@pytest.mark.parametrize("clients_per_host", [4, 3, 1])
@pytest.mark.parametrize("scheme", ["max_common", "clustered_fl"])
def test_bits_do_not_depend_on_where_clients_live_if_some_sit_a_round_out(
    run: Run, scheme: str, clients_per_host: int
) -> None:
    assert_like_the_reference(run, cell(scheme, sharing=FEW), clients_per_host)


@pytest.mark.parametrize("clients_per_host", [4, 1])
def test_clients_that_have_not_trained_yet_resume_from_a_checkpoint_of_other_hosts(
    backend: Backend, tmp_path: Path, clients_per_host: int
) -> None:
    config = cell(sharing=FEW)
    federation = start(config)
    federation.play_round()
    other = start(config, backend, clients_per_host)
    other.restore(saved(federation, tmp_path / "one"))
    assert other.state_sha256() == federation.state_sha256()
    other.play_round()
    federation.restore(saved(other, tmp_path / "two"))
    assert federation.state_sha256() == other.state_sha256() == reference(config)[1]


# --------------------------------------------------------------------------------------------------- in process alone


def clients_of(hosts: LocalHosts) -> list[Client]:
    return sorted((client for host in hosts._hosts for client in host._clients), key=lambda client: client.index)


def states_of(hosts: LocalHosts, shared: GroupState) -> list[State]:
    """The whole state of each client, in client order."""
    states = {client.index: client.state(host._complete(shared)) for host in hosts._hosts for client in host._clients}
    return [states[client] for client in range(NUM_CLIENTS)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reduce_block", [1, 2])
def test_only_drawn_clients_train_and_send_and_a_group_without_one_stays(scheme: str, reduce_block: int) -> None:
    """Each round is compared with clients that train one by one, and with `aggregate`, for which others weigh 0."""
    config = cell(scheme, sharing=SharingConfig(clients_per_round=2, reduce_block=reduce_block))
    hosts = LocalHosts(config, INFO, make_shards(config, INFO), clients_per_host=4)
    federation = Federation(config, INFO, hosts)
    alone = clients_of(LocalHosts(config, INFO, make_shards(config, INFO)))
    plan, states = federation.plan, states_of(hosts, {})
    averaged: set[int] = set()
    for round_index in range(4):
        chosen = participants(config, round_index)
        assert len(chosen) == 2
        expected = list(states)
        with numeric_settings(config.numerics):
            for client in chosen:
                alone[client].restore(states[client])
                _, contribution = run_to_end(alone[client].play_round(round_index, {}, train=True))
                expected[client] = apply_group_state(plan, client, alone[client].kept, contribution)
        weights = [float(client in chosen) for client in range(NUM_CLIENTS)]
        expected = aggregate(plan, expected, weights, reduce_block=reduce_block)
        result = federation.play_round()
        states = states_of(hosts, federation.shared)
        for state, wanted in zip(states, expected, strict=True):
            assert state.keys() == wanted.keys()
            assert [name for name in state if not torch.equal(state[name], wanted[name])] == []
        for measured_client in result.clients:
            client = measured_client.client
            groups = plan.groups_of(plan.architecture_of[client])
            received = sum(group.num_bytes for group in groups if group.index in averaged)
            sent = plan.bytes_per_round(client)
            assert (measured_client.bytes_up, measured_client.bytes_down) == (
                (sent, received) if client in chosen else (0, 0)
            )
            assert (measured_client.train_loss is None) == (client not in chosen)
        averaged |= {group.index for client in chosen for group in plan.groups_of(plan.architecture_of[client])}


def test_clients_are_drawn_without_replacement_evenly_and_for_each_round_anew() -> None:
    config = cell(sharing=FEW)
    draws = [participants(config, round_index) for round_index in range(800)]
    assert {len(draw) for draw in draws} == {3}
    counts = Counter(client for draw in draws for client in draw)
    assert sorted(counts) == list(range(NUM_CLIENTS))
    assert all(240 < count < 360 for count in counts.values())
    assert draws[0] == participants(cell("standalone", sharing=FEW), 0)
    assert draws[:8] != [participants(cell(seed=1, sharing=FEW), round_index) for round_index in range(8)]
    assert [sorted(draw) for draw in draws[:3]] == [[2, 6, 7], [0, 4, 6], [0, 3, 4]]  # or run ids would have to change
    assert participants(cell(), 5) == frozenset(range(NUM_CLIENTS))


def test_as_many_clients_per_round_as_there_are_is_the_default_and_more_are_refused() -> None:
    every = cell(sharing=SharingConfig(clients_per_round=NUM_CLIENTS))
    assert every == cell()
    assert every.run_id("data") == cell().run_id("data") != cell(sharing=FEW).run_id("data")
    with pytest.raises(ConfigError, match="clients_per_round is 9, but there are only 8 clients; ask for at most 8"):
        cell(sharing=SharingConfig(clients_per_round=9))


def test_hosts_that_would_cut_a_block_are_refused_with_the_remedy() -> None:
    config = cell(sharing=SharingConfig(reduce_block=4))
    with pytest.raises(ConfigError) as caught:
        LocalHosts(config, INFO, make_shards(config, INFO), clients_per_host=6)
    assert str(caught.value) == (
        "clients_per_actor is 6, not a multiple of reduce_block (4); all clients of a block live in one process: "
        "use 8 clients per actor"
    )


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 5))
def test_each_client_is_assigned_to_one_host_in_whole_blocks(
    num_clients: int, clients_per_host: int, reduce_block: int
) -> None:
    if clients_per_host < num_clients and clients_per_host % reduce_block:
        clients_per_host = reduce_block * -(-clients_per_host // reduce_block)
    hosts = assign_clients([client % 4 for client in range(num_clients)], clients_per_host, reduce_block)
    assert sorted(client for clients in hosts for client in clients) == [*range(num_clients)]
    assert all(len(clients) <= clients_per_host for clients in hosts)
    assert len(hosts) == -(-num_clients // clients_per_host)
    for clients in hosts:
        assert list(clients) == sorted(clients)
        for block in {client // reduce_block for client in clients}:
            assert set(range(block * reduce_block, min((block + 1) * reduce_block, num_clients))) <= set(clients)


def test_a_host_with_a_deep_model_gets_a_shallow_one_beside_it() -> None:
    assert assign_clients(VERSIONS, 2, 1) == [(0, 3), (1, 2), (4, 7), (5, 6)]
    assert assign_clients(VERSIONS, 4, 4) == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_clients_of_one_architecture_live_together_where_that_takes_no_longer() -> None:
    assert assign_clients(VERSIONS, 4, 1) == [(0, 3, 4, 7), (1, 2, 5, 6)]
    assert assign_clients([*VERSIONS, 0, 1], 5, 1) == [(0, 3, 4, 7, 8), (1, 2, 5, 6, 9)]
    assert assign_clients([0, 1, 2, 3, 0], 1, 1) == [(0,), (1,), (2,), (3,), (4,)], "no host may stay empty"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("clients_per_host", [8, 4, 2])
def test_only_what_clients_of_different_hosts_share_leaves_a_host(scheme: str, clients_per_host: int) -> None:
    config = cell(scheme)
    hosts = LocalHosts(config, INFO, make_shards(config, INFO), clients_per_host)
    federation = Federation(config, INFO, hosts)
    host_of = {client: host for host, clients in enumerate(hosts.clients) for client in clients}
    plan = federation.plan
    travelling = {group.index for group in plan.groups if len({host_of[client] for client in plan.members(group)}) > 1}
    federation.play_round()
    played = hosts.play_round(1, federation.shared, train=True)
    assert {group for host in played for block in host.blocks.values() for group in block} == travelling
    assert federation.shared is not None
    assert federation.shared.keys() == travelling


def saved(federation: Federation, folder: Path) -> Checkpoint:
    folder.mkdir()
    return Checkpoint(federation.next_round, folder, federation.save(folder))


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8), (4, 1), (1, 4), (2, 8)])
@pytest.mark.parametrize("scheme", ["clustered_common", "max_common"])
def test_clients_resume_from_a_checkpoint_wherever_they_lived_before(
    tmp_path: Path, scheme: str, before: int, after: int
) -> None:
    federation = start(cell(scheme), clients_per_host=before)
    federation.play_round()
    checkpoint = saved(federation, tmp_path / "one")
    other = start(cell(scheme), clients_per_host=after)
    other.restore(checkpoint)
    assert other.state_sha256() == federation.state_sha256()
    again = start(cell(scheme), clients_per_host=before)
    again.restore(saved(other, tmp_path / "two"))
    federation.play_round()
    again.play_round()
    assert again.state_sha256() == federation.state_sha256()


def test_a_checkpoint_without_a_group_is_refused(tmp_path: Path) -> None:
    federation = start(cell(), clients_per_host=4)
    federation.play_round()
    checkpoint = saved(federation, tmp_path / "one")
    for missing in (SHARED, "shared-000001.safetensors"):
        files = {name: digest for name, digest in checkpoint.files.items() if name != missing}
        with pytest.raises(ResultsError, match="does not hold all tensors of this cell"):
            start(cell(), clients_per_host=4).restore(replace(checkpoint, files=files))


def test_one_host_may_end_within_a_block() -> None:
    config = cell(sharing=SharingConfig(reduce_block=3))
    played = LocalHosts(config, INFO, make_shards(config, INFO)).play_round(0, {}, train=True)
    assert [len(host.blocks) for host in played] == [3]


@pytest.mark.parametrize(
    ("scheme", "weighting"), [("max_common", "uniform"), *((scheme, "samples") for scheme in SCHEMES)]
)
def test_a_round_is_the_pure_aggregate_of_the_trained_states(scheme: str, weighting: str) -> None:
    config = cell(scheme, sharing=SharingConfig(weighting=weighting, reduce_block=2))
    shards = uneven_shards(config)
    hosts = LocalHosts(config, INFO, shards, clients_per_host=2)
    federation = Federation(config, INFO, hosts)
    federation.play_round()
    # Neighbours have different versions, so each client of a host has a workspace of its own, still as it was trained.
    trained = [client._workspace.model.state_dict() for client in clients_of(hosts)]
    weights = [float(len(client_shards.train)) for client_shards in shards] if weighting == "samples" else None
    expected = flexifed.aggregate(federation.plan, trained, weights, reduce_block=2)
    for actual, state in zip(states_of(hosts, federation.shared), expected, strict=True):
        assert actual.keys() == state.keys()
        assert [name for name in state if not torch.equal(actual[name], state[name])] == []


class OneOfEachSize:
    """Hosts of four clients each, whose shared values differ so much in size that the sum depends on its order."""

    values = (1e30, -1e30, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    clients = tuple(assign_clients(VERSIONS, 4, 1))

    def __init__(self, plan: SharingPlan) -> None:
        self.plan = plan

    def play_round(self, round_index: int, shared: GroupState, *, train: bool) -> Sequence[HostRound]:
        return [
            HostRound((), {client: sum_block([(self.contribution(client), 1.0)]) for client in clients})
            for clients in self.clients
        ]

    def contribution(self, client: int) -> GroupState:
        return {
            index: tuple(torch.full(spec.shape, self.values[client]) for spec in self.plan.groups[index].specs)
            for index in self.plan.shared_names(client)
        }

    def state_sha256(self, shared: GroupState) -> dict[int, str]:
        raise NotImplementedError

    def device_names(self) -> list[str]:
        raise NotImplementedError


def test_sums_are_taken_in_client_order() -> None:
    plan = cell_plan(cell("basic_common"), INFO)
    federation = Federation(cell("basic_common"), INFO, OneOfEachSize(plan))
    federation.play_round()
    assert federation.shared is not None
    assert {value for tensor in federation.shared[0] for value in tensor.flatten().tolist()} == {6 / 8}


def test_a_host_sums_its_own_groups_in_client_order(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter(OneOfEachSize.values)

    def fill(workspace: Workspace, *_: object, **__: object) -> Steps[torch.Tensor]:
        yield
        value = next(values)
        with torch.no_grad():
            for parameter in workspace.model.parameters():
                parameter.fill_(value)
        return torch.tensor(0.0)

    monkeypatch.setattr("flexifed.federation.client.train", fill)
    config = cell("basic_common")
    hosts = LocalHosts(config, INFO, make_shards(config, INFO))
    federation = Federation(config, INFO, hosts)
    federation.play_round()
    weights = [state["features.0.conv.weight"] for state in states_of(hosts, federation.shared)]
    assert {value for weight in weights for value in weight.flatten().tolist()} == {6 / 8}


def test_a_client_yields_after_each_step_and_before_each_wait() -> None:
    config = cell(training=TrainingConfig(local_epochs=3, batch_size=10))  # of 25 images: three steps an epoch
    client = clients_of(LocalHosts(config, INFO, make_shards(config, INFO)))[0]
    assert len(list(client.play_round(0, {}, train=True))) == 1 + 3 * 3 + 1


def test_clients_that_overlap_all_queue_the_end_of_their_training_before_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[tuple[str, int]] = []
    for name in ("_extremes", "_take_out", "_check_finite"):
        before = getattr(Client, name)

        def noted(client: Client, *args: Any, before: Any = before, name: str = name) -> Any:
            order.append((name, client.index))
            return before(client, *args)

        monkeypatch.setattr(Client, name, noted)
    config = cell()
    host = LocalHosts(config, INFO, make_shards(config, INFO), 2, streams=2)._hosts[0]
    host.play_round(0, {}, train=True)
    first, second = (client.index for client in host._clients)
    queued = [(name, client) for client in (first, second) for name in ("_extremes", "_take_out")]
    assert order == [*queued, ("_check_finite", first), ("_check_finite", second)]


def test_steps_of_clients_that_overlap_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    step = Workspace.begin_training

    def noted(workspace: Workspace) -> Any:
        take = step(workspace)

        def noted_take(*batch: torch.Tensor) -> None:
            taken.append(id(workspace))
            take(*batch)

        noted_take.loss_sum = take.loss_sum  # type: ignore[attr-defined]
        return noted_take

    monkeypatch.setattr(Workspace, "begin_training", noted)
    config = cell(training=TrainingConfig(local_epochs=2))
    LocalHosts(config, INFO, make_shards(config, INFO), 2, streams=2)._hosts[0].play_round(0, {}, train=True)
    first, second = dict.fromkeys(taken)
    assert taken == [first, second, first, second]


def test_members_of_a_group_hold_equal_tensors_and_personal_layers_differ() -> None:
    config = cell("basic_common")
    hosts = LocalHosts(config, INFO, make_shards(config, INFO))
    federation = Federation(config, INFO, hosts)
    federation.play_round()
    states = states_of(hosts, federation.shared)
    plan = federation.plan
    assert [plan.members(group) for group in plan.groups] == [tuple(range(NUM_CLIENTS))]
    shared = [shared_tensors(plan, client, state)[0] for client, state in enumerate(states)]
    assert all(torch.equal(*pair) for tensors in shared[1:] for pair in zip(shared[0], tensors, strict=True))
    personal = states[0].keys() - {name for names in plan.shared_names(0).values() for name in names}
    weights = {name for name in personal if name.endswith("weight")}
    assert len(weights) == 17, "seven convolutions, each with its batch norm, and three linear layers"
    assert [name for name in weights if torch.equal(states[0][name], states[4][name])] == []


@pytest.mark.parametrize(("init", "equal"), [("shared", True), ("own", False)])
def test_common_layers_start_equal_only_where_all_draw_from_one_stream(init: str, equal: bool) -> None:
    config = cell(model=ModelConfig(width=0.03, init=init))
    hosts = LocalHosts(config, INFO, make_shards(config, INFO))
    plan = Federation(config, INFO, hosts).plan
    states = states_of(hosts, {})
    for group in plan.groups:
        first, *others = [shared_tensors(plan, client, states[client])[group.index] for client in plan.members(group)]
        weight = next(index for index, spec in enumerate(group.specs) if len(spec.shape) > 1)
        assert {torch.equal(first[weight], other[weight]) for other in others} == {equal}


def test_a_limit_keeps_the_head_of_every_shard() -> None:
    config = cell()
    whole = make_shards(config, INFO)
    limited = replace(config, partition=replace(config.partition, max_train=3, max_test=2))
    for shards, expected in zip(make_shards(limited, INFO), whole, strict=True):
        np.testing.assert_array_equal(shards.train, expected.train[:3])
        np.testing.assert_array_equal(shards.test, expected.test[:2])
    beyond = replace(config, partition=replace(config.partition, max_train=10**9))
    np.testing.assert_array_equal(make_shards(beyond, INFO)[0].train, whole[0].train)


def test_a_clients_test_labels_are_skewed_as_its_training_labels_are() -> None:
    config = cell()
    data = open_dataset(INFO)

    def proportions(alpha: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Class proportions of the clients' training and test shards, shapes (4, 10)."""
        partition = PartitionConfig(num_clients=4, num_shards=40, dirichlet_alpha=alpha)
        shards = make_shards(replace(config, partition=partition), INFO)
        return tuple(
            np.stack([np.bincount(labels[indices], minlength=10) / len(indices) for indices in parts])
            for labels, parts in (
                (data.train.labels, [client.train for client in shards]),
                (data.test.labels, [client.test for client in shards]),
            )
        )

    train, test = proportions(0.5)
    even, _ = proportions(None)
    assert np.abs(train - even).sum(axis=1).min() > 0.4  # every client is skewed, ...
    own = np.abs(train - test).sum(axis=1)
    others = np.abs(train - np.roll(test, 1, axis=0)).sum(axis=1)
    assert (own < others / 2).all()  # ... and each in its own way


def test_skewed_labels_are_part_of_the_run_id_and_depend_on_the_seed_alone() -> None:
    config = cell()
    skewed = replace(config, partition=replace(config.partition, dirichlet_alpha=0.5))
    assert len({config.run_id("data"), skewed.run_id("data")}) == 2
    first, again = make_shards(skewed, INFO), make_shards(replace(skewed, scheme="standalone"), INFO)
    assert all(np.array_equal(ours.train, theirs.train) for ours, theirs in zip(first, again, strict=True))
    other_seed = make_shards(replace(skewed, seed=1), INFO)
    assert not np.array_equal(first[0].train, other_seed[0].train)


def test_a_limit_is_part_of_the_run_id_and_its_absence_is_not() -> None:
    config = cell()
    limited = replace(config, partition=replace(config.partition, max_train=3))
    assert config.run_id("data") != limited.run_id("data")
    assert CellConfig(dataset="cifar10", family="vgg", scheme="standalone").run_id("real") == "cd451c461a63eb69"


def test_another_seed_draws_other_weights_and_other_shards() -> None:
    first, other = cell(), cell(seed=1)
    assert not set(start(first).state_sha256()) & set(start(other).state_sha256())
    assert not np.array_equal(make_shards(first, INFO)[0].train, make_shards(other, INFO)[0].train)


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> float:
        raise LookupError("no such kernel")

    monkeypatch.setattr("flexifed.federation.client.train", broken)
    with pytest.raises(ClientError, match=r"client 0, round 0, training: Traceback[\s\S]*LookupError: no such kernel"):
        start(cell()).play_round()


def test_a_round_on_a_gpu_that_was_too_full_for_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shortages = iter([2, 2, 2, 3])
    monkeypatch.setattr("flexifed.federation.host.device_shortages", lambda device: next(shortages))
    federation = start(cell())
    federation.play_round()
    with pytest.raises(DeviceMemoryError, match=r"^clients 0 to 7, round 1: the GPU was too full at some point, "):
        federation.play_round()


PLAY_A_ROUND = """
import sys
from pathlib import Path
from flexifed.config import CellConfig, ModelConfig, PartitionConfig, TrainingConfig
from flexifed.data import find_dataset
from flexifed.federation.cell import make_shards
from flexifed.federation.rounds import Federation, LocalHosts

for dataset, family in [
    ("cifar10", "vgg"),
    ("cifar10", "resnet"),
    ("agnews", "charcnn"),
    ("agnews", "vdcnn"),
    ("speech_commands", "vgg"),
]:
    config = CellConfig(
        dataset=dataset,
        family=family,
        scheme="max_common",
        model=ModelConfig(width=0.05),
        partition=PartitionConfig(num_shards=400, windows_per_shard=1, max_train=4, max_test=4),
        training=TrainingConfig(local_epochs=1),
    )
    info = find_dataset(dataset, data="synthetic", data_dir=Path())
    Federation(config, info, LocalHosts(config, info, make_shards(config, info))).play_round()
    print(dataset, family, sorted({"sympy", "torch._dynamo"} & set(sys.modules)))
"""


def test_a_round_does_not_import_the_compiler_of_pytorch() -> None:
    """Importing it takes a process a second and a hundred megabytes."""
    played = subprocess.run([sys.executable, "-c", PLAY_A_ROUND], check=True, capture_output=True, text=True)
    assert [line.split()[-1] for line in played.stdout.splitlines()] == ["[]"] * 5, played.stdout


# ------------------------------------------------------------------------------------------------------- on Ray alone


@pytest.mark.slow
@pytest.mark.ray
def test_eight_clients_share_one_gpu_and_train_at_the_same_time(eight_actors: ActorHosts) -> None:
    def assigned(_: Any) -> tuple[int, list[int | str], float]:  # nested, so that it travels by value
        return os.getpid(), ray.get_gpu_ids(), ray.get_runtime_context().get_assigned_resources()["GPU"]

    config = cell(training=TrainingConfig(local_epochs=10))
    federation = start(config, partial(on_ray, SomeActors, eight_actors), 1)
    federation.play_round()  # the first one imports what training needs
    trained = federation.play_round().clients
    places = ray.get([actor.__ray_call__.remote(assigned) for actor in eight_actors._actors])
    assert len({pid for pid, _, _ in places}) == NUM_CLIENTS
    assert {(len(gpus), str(gpus[0]), share) for _, gpus, share in places} == {(1, "0", 0.125)}
    spans = [
        (client.train_started or 0.0, (client.train_started or 0.0) + (client.train_s or 0.0)) for client in trained
    ]
    together = [sum(start < other_end and other < end for other, other_end in spans) for start, end in spans]
    assert max(together) > 1, f"no client trains while another does: {spans}"


@pytest.mark.slow
@pytest.mark.ray
def test_where_lending_does_not_work_tensors_travel_and_the_log_can_say_why(eight_actors: ActorHosts) -> None:
    class Unlucky(LendingActors):
        def _lend_on(self, device: torch.device) -> None:
            super()._lend_on(device)
            raise RuntimeError("CUDA error: operation not supported\nSearch for it.\nCompile with `TORCH_USE_CUDA_DSA`")

    config = cell()
    clients = tuple(assign_clients(VERSIONS, 4, 1))
    hosts = Unlucky(eight_actors, len(clients))
    placement = CellPlacement(clients=clients, cpus_per_actor=1, gpus_per_actor=0)
    hosts.begin(config, INFO, placement, make_shards(config, INFO))
    assert hosts.exchange == (
        "tensors travel through Ray's object store, and don't stay on a GPU: CUDA error: operation not supported"
    )
    assert_played_like_the_reference(hosts, config)


@pytest.mark.slow
@pytest.mark.ray
def test_processes_start_lending_again_in_each_cell_whatever_came_before(eight_actors: ActorHosts) -> None:
    """Play cells in the same processes: one, a larger one, one that shares nothing, and the first again."""
    hosts = LendingActors(eight_actors, 4)
    clients = tuple(assign_clients(VERSIONS, 2, 1))
    placement = CellPlacement(clients=clients, cpus_per_actor=1, gpus_per_actor=0)
    small, large = cell(), cell(model=ModelConfig(width=0.06))
    for config in (small, large, cell("standalone"), small, small):
        hosts.begin(config, INFO, placement, make_shards(config, INFO))
        assert ("stay" in hosts.exchange) == (config.scheme != "standalone")
        assert_played_like_the_reference(hosts, config)


@pytest.mark.slow
@pytest.mark.ray
def test_tensors_travel_if_cuda_ipc_is_off(eight_actors: ActorHosts) -> None:
    hosts, clients = LendingActors(eight_actors, 2), tuple(assign_clients(VERSIONS, 4, 1))
    placement = CellPlacement(clients=clients, cpus_per_actor=1, gpus_per_actor=0, cuda_ipc=False)
    hosts.begin(cell(), INFO, placement, make_shards(cell(), INFO))
    assert hosts.exchange == "tensors travel through Ray's object store"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees none")
def test_on_a_gpu_tensors_stay_there_and_bits_are_those_of_tensors_that_travel(eight_actors: ActorHosts) -> None:
    config = cell(device="cuda")
    clients = tuple(assign_clients(VERSIONS, 1, 1))
    runs = []
    for cuda_ipc in (True, False):
        hosts = SomeActors(eight_actors, len(clients))
        placement = CellPlacement(clients=clients, cpus_per_actor=1, gpus_per_actor=0.125, cuda_ipc=cuda_ipc)
        hosts.begin(config, INFO, placement, make_shards(config, INFO))
        assert hosts.exchange.startswith("tensors stay on" if cuda_ipc else "tensors travel"), hosts.exchange
        federation = Federation(config, INFO, hosts)
        runs.append((measured(federation.play_round() for _ in range(3)), federation.state_sha256()))
    assert runs[0] == runs[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees none")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_on_a_gpu_streams_change_no_bit(cuda_graph: bool) -> None:
    config = cell(
        device="cuda", training=TrainingConfig(local_epochs=4), numerics=NumericsConfig(cuda_graph=cuda_graph)
    )
    runs = []
    for streams in (1, 4, 8, 8):
        federation = Federation(config, INFO, LocalHosts(config, INFO, make_shards(config, INFO), streams=streams))
        runs.append((measured(federation.play_round() for _ in range(3)), federation.state_sha256()))
    assert all(run == runs[0] for run in runs[1:])


# ------------------------------------------------------------------------------------------------------------ the wire

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors with any bits (also NaN with any payload), of any type and small shape, in either memory format."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 256, size, dtype=np.uint8)
    if dtype == torch.bool:
        raw &= 1
    tensor = torch.empty(size, dtype=torch.uint8).copy_(torch.from_numpy(raw)).view(dtype).view(shape)
    if len(shape) == 4 and draw(st.booleans()):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


@given(st.lists(tensors(), max_size=6))
@settings(max_examples=200, deadline=None)
def test_packing_keeps_type_shape_and_every_bit(sent: list[torch.Tensor]) -> None:
    assume(not sent or any(tensor.numel() for tensor in sent))
    packed = ObjectStore().write(sent)
    packed.buffer.flags.writeable = False  # as it is when it comes out of Ray's shared memory
    arrived = ObjectStore().read(packed)
    assert [(tensor.dtype, tensor.shape, bits(tensor)) for tensor in arrived] == [
        (tensor.dtype, tensor.shape, bits(tensor)) for tensor in sent
    ]


def test_packing_takes_a_message_of_empty_tensors_alone() -> None:
    (arrived,) = ObjectStore().read(ObjectStore().write([torch.empty(3, 0)]))
    assert (arrived.dtype, arrived.shape) == (torch.float32, (3, 0))


@given(st.dictionaries(st.integers(0, 50), st.lists(tensors(), max_size=3).map(tuple), max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_groups_and_block_sums_arrive_as_they_were_sent(
    state: dict[int, tuple[torch.Tensor, ...]], data: st.DataObject
) -> None:
    assume(not any(state.values()) or any(tensor.numel() for group in state.values() for tensor in group))
    arrived = unpack(pack(state, ObjectStore()), ObjectStore())
    assert list(arrived) == list(state)
    assert [[bits(tensor) for tensor in group] for group in arrived.values()] == [
        [bits(tensor) for tensor in group] for group in state.values()
    ]
    weights, flags = st.floats(0, 1e6), st.booleans()
    block = {index: BlockSum(group, data.draw(weights), data.draw(flags)) for index, group in state.items()}
    played = unpack(pack(HostRound((), {4: {}, 7: block}), ObjectStore()), ObjectStore())
    empty, same = played.blocks[4], played.blocks[7]
    assert (empty, list(same)) == ({}, list(block))
    assert [(block_sum.weight, block_sum.weighted) for block_sum in same.values()] == [
        (block_sum.weight, block_sum.weighted) for block_sum in block.values()
    ]
    assert [[bits(tensor) for tensor in sums.tensors] for sums in same.values()] == [
        [bits(tensor) for tensor in sums.tensors] for sums in block.values()
    ]


def test_every_client_needs_a_shard() -> None:
    config = cell()
    shards = make_shards(config, INFO)
    with pytest.raises(ConfigError, match=f"{len(shards) - 1} shards for {len(shards)} clients; give one for each"):
        LocalHosts(config, INFO, shards[:-1])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1], np.arange(2), "training samples of client 1 are a list; give their indices, a NumPy array of int"),
        (
            np.arange(2),
            np.ones(9, dtype=bool),
            r"test samples of client 1 are a ndarray of bool, shape \(9,\); .*np\.flatnonzero",
        ),
        (np.arange(2.0), np.arange(2), "training samples of client 1 are a ndarray of float64"),
        (
            np.arange(4).reshape(2, 2),
            np.arange(2),
            r"training samples of client 1 are a ndarray of int64, shape \(2, 2\)",
        ),
        (np.arange(0), np.arange(2), "training samples of client 1 are none; give each client at least one"),
        (np.arange(2), np.arange(0), "test samples of client 1 are none; give each client at least one"),
        (np.array([0, -1]), np.arange(2), f"client 1 are -1 to 0, but the data set has 0 to {INFO.num_train - 1}"),
        (np.arange(2), np.array([INFO.num_test]), f"but the data set has 0 to {INFO.num_test - 1}"),
    ],
    ids=["list", "mask", "fractions", "rows", "no training", "no test", "negative", "past the end"],
)
def test_shards_that_are_no_indices_into_the_data_are_refused(train: Any, test: Any, message: str) -> None:
    config = cell()
    shards = make_shards(config, INFO)
    with pytest.raises(ConfigError, match=message):
        LocalHosts(config, INFO, [shards[0], ClientShards(train, test), *shards[2:]])
    with pytest.raises(ConfigError, match="the shard of client 0 is a tuple; give a ClientShards"):
        LocalHosts(config, INFO, [(train, test), *shards[1:]])


def test_shards_are_cut_from_one_permutation_of_each_set() -> None:
    config = cell()
    generator = numpy_generator(config.seed, "partition")
    orders = [generator.permutation(count) for count in (INFO.num_train, INFO.num_test)]
    for client, shards in enumerate(make_shards(config, INFO)):
        for order, indices in zip(orders, (shards.train, shards.test), strict=True):
            length = len(order) // config.partition.num_shards
            assert indices.tolist() == order[client * length : (client + 1) * length][: len(indices)].tolist()


def test_times_are_of_the_whole_round_and_of_its_aggregation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    config = cell()
    hosts = LocalHosts(config, INFO, make_shards(config, INFO), clients_per_host=4)
    play_round, combine = hosts.play_round, rounds.combine_blocks

    def advance(seconds: float, value: Any) -> Any:
        clock[0] += seconds
        return value

    monkeypatch.setattr(hosts, "play_round", lambda *given, **options: advance(5.0, play_round(*given, **options)))
    monkeypatch.setattr(rounds, "combine_blocks", lambda *given: advance(2.0, combine(*given)))
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock[0])
    result = Federation(config, INFO, hosts).play_round()
    assert (result.round_s, result.aggregate_s) == (7.0, 2.0)


def test_training_starts_after_scoring_and_ends_before_the_round_does() -> None:
    config = cell()
    before = time.time()
    result = Federation(config, INFO, LocalHosts(config, INFO, make_shards(config, INFO))).play_round()
    after = time.time()
    for client in result.clients:
        assert before + client.eval_s <= client.train_started <= after - client.train_s

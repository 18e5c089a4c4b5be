"""Joining a cluster: which nodes it has, and that it does not matter on which of them clients run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from flexifed.config import CellConfig, ModelConfig, PartitionConfig, TrainingConfig
from flexifed.data import find_dataset
from flexifed.errors import ResourceError
from flexifed.federation.assignment import assign_clients
from flexifed.federation.cell import make_shards
from flexifed.federation.rounds import Federation, Hosts, LocalHosts
from flexifed.orchestra import cluster
from flexifed.orchestra.actors import ActorHosts
from flexifed.orchestra.estimate import this_machine
from flexifed.orchestra.placement import CellPlacement, Resources

HEAD: Resources = {"memory": 1e9, "CPU": 0.0}
WORKER: Resources = {"memory": 1e9, "CPU": 8.0, "GPU": 1.0}


class GrowingCluster:
    """A cluster that has one more node each time it is queried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: Sequence[Resources]) -> None:
        self.nodes, self.queries = nodes, 0
        self.demands: list[str] = []
        monkeypatch.setattr(cluster, "nodes", self.query)
        monkeypatch.setattr(cluster, "demand", self.demanded)

    def query(self) -> list[Resources]:
        self.queries += 1
        return [*self.nodes[: self.queries]]

    @contextmanager
    def demanded(self, bundles: Sequence[Mapping[str, float]], strategy: str) -> Iterator[None]:
        assert strategy == "STRICT_SPREAD"
        self.demands.append(f"{len(bundles)} wanted")
        yield
        self.demands.append("no more")


def test_nodes_that_cannot_hold_clients_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    growing, counts = GrowingCluster(monkeypatch, [HEAD, HEAD, WORKER, WORKER, WORKER]), list[int]()
    assert cluster.wait_for_nodes(2, counts.append, poll_s=0) == [HEAD, HEAD, WORKER, WORKER]
    assert counts == [0, 1], "each number once"
    assert growing.queries == 4
    assert growing.demands == ["2 wanted", "no more"], "asked for once, and not kept"


def test_a_complete_cluster_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = GrowingCluster(monkeypatch, [WORKER])
    assert cluster.wait_for_nodes(1, pytest.fail, timeout_s=0) == [WORKER]
    assert growing.queries == 1
    assert growing.demands == []


def test_without_ask_no_nodes_are_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = GrowingCluster(monkeypatch, [HEAD, WORKER])
    assert cluster.wait_for_nodes(1, lambda _: None, ask=False, poll_s=0) == [HEAD, WORKER]
    assert growing.demands == []


def test_nodes_that_never_come_are_an_error_with_numbers_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    GrowingCluster(monkeypatch, [HEAD, WORKER])
    with pytest.raises(ResourceError) as caught:
        cluster.wait_for_nodes(3, lambda _: None, timeout_s=0)
    expected_parts = ["min_nodes is 3", "after 0 s the cluster has 0 with CPUs", "`ray status`", "--min-nodes"]
    assert [part for part in expected_parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("gpus_of_torch", "num_gpus", "expected"),
    [
        pytest.param(2, None, 2, id="PyTorch can use two"),
        pytest.param(0, None, None, id="it can use none, so Ray counts"),
        pytest.param(2, 1, 1, id="the caller says one"),
        pytest.param(2, 0, 0, id="the caller says none"),
    ],
)
def test_a_ray_started_here_has_the_gpus_that_pytorch_can_use(
    monkeypatch: pytest.MonkeyPatch, gpus_of_torch: int, num_gpus: int | None, expected: int | None
) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus_of_torch > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus_of_torch)
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    with cluster.connected(None, num_gpus=num_gpus):
        assert [options["num_gpus"] for options in started] == [expected]
        assert this_machine()["GPU"] == gpus_of_torch


# --------------------------------------------------------------------------------------------------- on three nodes

NUM_CLIENTS = 8
INFO = find_dataset("cifar10", data="synthetic", data_dir=Path("nowhere"))
CONFIG = CellConfig(
    dataset="cifar10",
    family="vgg",
    scheme="max_common",
    model=ModelConfig(width=0.03),
    partition=PartitionConfig(num_clients=NUM_CLIENTS, num_shards=800, windows_per_shard=1),
    training=TrainingConfig(local_epochs=1, batch_size=8),
)


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[None]:
    """Three nodes of 4 CPUs each, and this process as their driver."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    try:
        for _ in range(2):
            started.add_node(num_cpus=4)
        with cluster.connected(started.address):
            started.wait_for_nodes()
            yield
    finally:
        started.shutdown()


def digests(hosts: Hosts) -> tuple[str, ...]:
    """The digests of the final states, after two rounds of training and one of scoring."""
    federation = Federation(CONFIG, INFO, hosts)
    for round_index in range(3):
        federation.play_round(train=round_index < 2)
    return federation.state_sha256()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("three_nodes")
@pytest.mark.parametrize(
    ("strategy", "clients_per_actor", "num_nodes"), [("STRICT_SPREAD", 3, 3), ("STRICT_PACK", 3, 1), ("SPREAD", 1, 3)]
)
def test_final_states_are_those_of_one_process_wherever_clients_run(
    strategy: str, clients_per_actor: int, num_nodes: int
) -> None:
    def node_of(_: Any) -> str:  # nested, so that it travels by value
        return str(ray.get_runtime_context().get_node_id())

    assert len(cluster.wait_for_nodes(3, lambda _: None, timeout_s=60)) == 3
    shards = make_shards(CONFIG, INFO)
    clients = tuple(assign_clients(CONFIG.client_versions, clients_per_actor, CONFIG.sharing.reduce_block))
    group = ray.util.placement_group([{"CPU": 1}] * len(clients), strategy=strategy)
    ray.get(group.ready())
    hosts = ActorHosts(group)
    try:
        hosts.begin(CONFIG, INFO, CellPlacement(clients=clients, cpus_per_actor=1, gpus_per_actor=0), shards)
        actual = digests(hosts)
        places = ray.get([actor.__ray_call__.remote(node_of) for actor in hosts._actors])
    finally:
        hosts.shut_down()
        ray.util.remove_placement_group(group)
    assert len(set(places)) == num_nodes
    assert actual == digests(LocalHosts(CONFIG, INFO, shards))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("three_nodes")
def test_every_node_is_asked_and_those_with_a_problem_are_named() -> None:
    this_node = ray.get_runtime_context().get_node_id()

    def check() -> None:
        if ray.get_runtime_context().get_node_id() != this_node:
            raise ResourceError("no data in /data")

    def stale() -> None:
        raise OSError(116, "Stale file handle")

    def dead() -> None:
        os._exit(1)

    others = [node for node in ray.nodes() if node["NodeID"] != this_node]
    assert len(others) == 2
    assert cluster.check_nodes(check) == {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, node {node['NodeID'][:8]})": "no data in /data"
        for node in others
    }
    assert list(cluster.check_nodes(stale).values()) == ["OSError: [Errno 116] Stale file handle"] * 3
    assert cluster.check_nodes(dead) == {}, "a node that is being lost is not a problem"
    assert cluster.check_nodes(lambda: None) == {}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("three_nodes")
def test_a_demand_waits_where_an_autoscaler_sees_it_and_is_taken_back() -> None:
    def states() -> list[str]:
        groups = ray.util.placement_group_table().values()
        return [group["state"] for group in groups if len(group["bundles"]) == 4]

    with cluster.demand([{"CPU": 0.001}] * 4, "STRICT_SPREAD"):
        assert states() == ["PENDING"], "there are three nodes"
    assert states() == ["REMOVED"]


def test_workers_environments_are_not_rebuilt_under_uv_run_even_if_ray_was_imported_first() -> None:
    """Ray reads that setting when it is imported, and a script's imports are sorted."""
    program = "import ray, flexifed.orchestra.cluster; print(ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "False"


@pytest.mark.parametrize(("user_setting", "expected"), [(None, "32"), ("4", "4")])
def test_processes_that_host_clients_get_enough_hardware_queues_unless_the_user_says_otherwise(
    user_setting: str | None, expected: str
) -> None:
    """Set on import, because the workers of a running cluster inherit nothing from the command."""
    program = (
        "import flexifed.orchestra.client_actor, os, torch\n"
        "print(os.environ['CUDA_DEVICE_MAX_CONNECTIONS'], torch.cuda.is_initialized())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": user_setting} if user_setting else {}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout.split() == [expected, "False"]

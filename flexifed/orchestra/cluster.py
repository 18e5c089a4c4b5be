"""Join a Ray cluster, or start one on this machine for as long as it is needed."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import ray
import torch
from ray._private import ray_constants
from ray._private.utils import get_num_cpus
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flexifed.errors import FlexifedError, ResourceError
from flexifed.orchestra.placement import Resources
from flexifed.stopping import uninterrupted

# Ray reads this variable when it is imported, which may have been before this package set it.
ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = ray_constants.env_bool("RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)

NODES_TIMEOUT_S = 1800.0
_ANSWER_S = 5.0
_ANY_CPU = 0.001  # a share so small that every node with CPUs has it


@contextmanager
def connected(address: str | None, *, num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[None]:
    """Connect to Ray for the length of a `with` block.

    Args:
        address: the address of a running cluster (`auto` finds one on this machine). None starts Ray here, and ends it
            afterwards.
        num_cpus: how many CPUs a Ray that is started here claims; None for those that this process may use.
        num_gpus: how many GPUs it claims; None for those that PyTorch can use, or, if it can use none, those that Ray
            finds.

    Raises:
        ResourceError: nothing answers at the address, or Ray does not start.
    """
    if address is None:
        _start(num_cpus, num_gpus)
    else:
        _join(address)
    try:
        yield
    finally:
        with uninterrupted():
            ray.shutdown()


def _start(num_cpus: int | None, num_gpus: int | None) -> None:
    """Start Ray on this machine. Try twice, because on a loaded machine its agents may start too late."""
    for attempt in (1, 2):
        try:
            ray.init(
                address="local",
                num_cpus=usable_cpus() if num_cpus is None else num_cpus,
                num_gpus=num_gpus if num_gpus is not None else usable_gpus() or None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray raises bare Exceptions here
            ray.shutdown()
            if attempt == 2:
                raise ResourceError(
                    f"Ray does not start on this machine ({error}); the machine may be too loaded or /tmp full: fix "
                    "that, or start Ray yourself by `ray start --head` and use --address auto"
                ) from error


def usable_cpus() -> int:
    """The CPUs that this process may use: a container's CPUs as Ray counts them, limited by the process's affinity.

    Ray itself ignores affinity, by which batch systems and `taskset` give a job part of a machine.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else math.inf
    return max(1, int(min(affinity, get_num_cpus(override_docker_cpu_warning=True))))


def usable_gpus() -> int:
    """The GPUs that PyTorch can use in this process: none, for example, if the driver is too old for it.

    Ray itself asks the driver (NVML), which may count others.
    """
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _join(address: str) -> None:
    """Join a cluster. Test the address first, because Ray would try a dead one for minutes."""
    if address.startswith("ray://"):
        raise ResourceError(
            f"{address!r} is a Ray Client address, which can't drive a grid; run the command on a machine of the "
            "cluster with --address auto, or submit it there by `ray job submit` (docs/clusters.md)"
        )
    try:
        if match := re.fullmatch(r"(.+):(\d+)", address):
            socket.create_connection((match[1], int(match[2])), timeout=_ANSWER_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises bare Exceptions here
        raise ResourceError(
            f"no Ray cluster answers at {address!r} ({error}); check --address and RAY_ADDRESS, "
            "or leave both out to start Ray here"
        ) from error


def wait_for_nodes(
    min_nodes: int,
    on_change: Callable[[int], None],
    *,
    ask: bool = True,
    timeout_s: float = NODES_TIMEOUT_S,
    poll_s: float = 2.0,
) -> list[Resources]:
    """Wait until enough nodes have joined the connected cluster; returns the resources of each.

    Args:
        min_nodes: how many nodes with CPUs are needed; a head node without CPUs can hold no clients and does not count.
        on_change: is called with the number of such nodes whenever it has changed and is too small.
        ask: whether to let a cluster that can rent nodes do so.
        timeout_s: how long to wait; a rented machine takes minutes to start.
        poll_s: seconds between checks.

    Raises:
        ResourceError: there were too few nodes after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    reported: int | None = None
    with ExitStack() as demands:
        while True:
            cluster = nodes()
            present = sum(node.get("CPU", 0) > 0 for node in cluster)
            if present >= min_nodes:
                return cluster
            if time.monotonic() >= deadline:
                raise ResourceError(
                    f"min_nodes is {min_nodes}, but after {timeout_s:g} s the cluster has {present} with CPUs; "
                    "see `ray status` on the head for the others, or lower --min-nodes"
                )
            if ask and reported is None:
                demands.enter_context(demand([{"CPU": _ANY_CPU}] * min_nodes, "STRICT_SPREAD"))
            if present != reported:
                on_change(present)
                reported = present
            time.sleep(poll_s)


@contextmanager
def demand(bundles: Sequence[Mapping[str, float]], strategy: str = "PACK") -> Iterator[None]:
    """Show Ray's autoscaler that resources are needed, for the length of a `with` block.

    The autoscaler rents nodes only for requests that are waiting, and a cell that does not fit is never requested.

    Args:
        bundles: resources; one node has to have all of a bundle.
        strategy: the strategy of a placement group; `STRICT_SPREAD` puts each bundle on a node of its own.
    """
    group = ray.util.placement_group([dict(bundle) for bundle in bundles if bundle], strategy)
    try:
        yield
    finally:
        ray.util.remove_placement_group(group)


def check_nodes(check: Callable[[], None]) -> dict[str, str]:
    """Run a check on every node that can hold clients.

    Args:
        check: is sent to the nodes, and raises an error if something is wrong there.

    Returns:
        The problem of each node that has one, by the node's name.
    """
    able_nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    run_check = ray.remote(num_cpus=0, max_retries=0)(_problem)
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in able_nodes]
    answers = [run_check.options(scheduling_strategy=strategy).remote(check) for strategy in strategies]
    problems = {}
    for node, answer in zip(able_nodes, answers, strict=True):
        try:
            problem = ray.get(answer)
        except (RayTaskError, RuntimeEnvSetupError) as error:  # the check could not start
            problem = str(error).strip().splitlines()[-1]
        except RayError:  # the node is being lost, which a grid survives
            continue
        if problem:
            address, number = node["NodeManagerAddress"], node["NodeID"][:8]
            problems[f"{node['NodeManagerHostname']} ({address}, node {number})"] = problem
    return problems


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except FlexifedError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def nodes() -> list[Resources]:
    """The resources of each living node of the connected cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def has_gpus(cluster: Sequence[Resources]) -> bool:
    """Whether any node has a GPU."""
    return any(node.get("GPU", 0) > 0 for node in cluster)

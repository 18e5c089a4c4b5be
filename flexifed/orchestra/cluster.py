"""Joining a Ray cluster, or starting one on this machine for as long as it is needed."""

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

# Ray reads this one when it is imported, which may have been before this package set it.
ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = ray_constants.env_bool("RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)

NODES_TIMEOUT_S = 1800.0
_ANSWER_S = 5.0
_A_LITTLE = 0.001  # of a CPU, so that it matters only which nodes have any


@contextmanager
def connected(address: str | None, *, num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray for the length of a `with` block.

    Args:
        address: of a running cluster (`auto` finds one on this machine); None starts Ray here, and ends it afterwards.
        num_cpus: how many CPUs a Ray that is started here claims; None for those that this process may use.
        num_gpus: how many GPUs it claims; None for those that PyTorch can use, or, if it can use none, those that Ray
            finds.

    Raises:
        ResourceError: nothing answers at the address, or Ray does not come up.
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
    """Start Ray on this machine. On a loaded one its agents may come up too late for it; then once more."""
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
                    f"Ray does not start on this machine ({error}); the machine may be too loaded or /tmp full: mend "
                    "that, or start Ray yourself by `ray start --head` and use --address auto"
                ) from error


def usable_cpus() -> int:
    """The CPUs that this process may use: of a container as Ray counts them, and of those the ones it is bound to.

    Ray itself knows no affinity, by which batch systems and `taskset` give a job a part of a machine.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else math.inf
    return max(1, int(min(affinity, get_num_cpus(override_docker_cpu_warning=True))))


def usable_gpus() -> int:
    """The GPUs that PyTorch can use in this process: none, for example, if the driver is too old for it.

    Ray itself asks the driver (NVML), which may count others.
    """
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _join(address: str) -> None:
    """Join a cluster. Ray itself would try a dead address for minutes."""
    if address.startswith("ray://"):
        raise ResourceError(
            f"{address!r} is an address of Ray Client, which can't drive a grid; run the command on a machine of the "
            "cluster with --address auto, or submit it there by `ray job submit` (docs/clusters.md)"
        )
    try:
        if match := re.fullmatch(r"(.+):(\d+)", address):
            socket.create_connection((match[1], int(match[2])), timeout=_ANSWER_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # likewise
        raise ResourceError(
            f"no Ray cluster answers at {address!r} ({error}); check --address and RAY_ADDRESS, "
            "or leave both out to start Ray here"
        ) from error


def wait_for_nodes(
    min_nodes: int,
    say: Callable[[int], None],
    *,
    ask: bool = True,
    timeout_s: float = NODES_TIMEOUT_S,
    poll_s: float = 2.0,
) -> list[Resources]:
    """The resources of each node of the connected cluster, once enough have joined it.

    Args:
        min_nodes: so many that can hold clients, that is, have CPUs; a head that only leads does not count.
        say: is told how many there are, whenever the number has changed and is too small.
        ask: let a cluster that can rent nodes do so.
        timeout_s: how long to wait; a rented machine takes minutes to come up.
        poll_s: seconds between looks.

    Raises:
        ResourceError: there were too few in the end.
    """
    deadline = time.monotonic() + timeout_s
    told = -1
    with ExitStack() as demands:
        while True:
            found = nodes()
            present = sum(node.get("CPU", 0) > 0 for node in found)
            if present >= min_nodes:
                return found
            if time.monotonic() >= deadline:
                raise ResourceError(
                    f"min_nodes is {min_nodes}, but after {timeout_s:g} s the cluster has {present} with CPUs; "
                    "`ray status` on the head says what became of the others; or lower --min-nodes"
                )
            if ask and told < 0:
                demands.enter_context(demand([{"CPU": _A_LITTLE}] * min_nodes, "STRICT_SPREAD"))
            if present != told:
                say(present)
                told = present
            time.sleep(poll_s)


@contextmanager
def demand(bundles: Sequence[Mapping[str, float]], strategy: str = "PACK") -> Iterator[None]:
    """For the length of a `with` block, let whoever can add nodes to the cluster see that so much is wanted.

    Ray's autoscaler rents for what waits, and not for what would be asked for if there were room.

    Args:
        bundles: resources, each of which one node has to have.
        strategy: of a placement group; `STRICT_SPREAD` for each bundle on a node of its own.
    """
    group = ray.util.placement_group([dict(bundle) for bundle in bundles if bundle], strategy)
    try:
        yield
    finally:
        ray.util.remove_placement_group(group)


def check_nodes(check: Callable[[], None]) -> dict[str, str]:
    """Let every node that can hold clients try something.

    Args:
        check: it is sent to the nodes, and raises an error where something is wrong.

    Returns:
        By the name of a node for which something is: what.
    """
    holding = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    problem = ray.remote(num_cpus=0, max_retries=0)(_problem)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in holding]
    answers = [problem.options(scheduling_strategy=place).remote(check) for place in places]
    problems = {}
    for node, answer in zip(holding, answers, strict=True):
        try:
            found = ray.get(answer)
        except (RayTaskError, RuntimeEnvSetupError) as error:  # it can't even begin to try
            found = str(error).strip().splitlines()[-1]
        except RayError:  # the node is going; a grid knows how to do without it
            continue
        if found:
            address, number = node["NodeManagerAddress"], node["NodeID"][:8]
            problems[f"{node['NodeManagerHostname']} ({address}, node {number})"] = found
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

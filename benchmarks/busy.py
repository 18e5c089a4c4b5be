"""How busy processes and devices are: the time in which they work, and its share of the whole."""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from flexifed.federation.rounds import RoundResult

_KINDS = {"cpu": (ProfilerActivity.CPU, DeviceType.CPU), "cuda": (ProfilerActivity.CUDA, DeviceType.CUDA)}


@dataclass(frozen=True)
class Work:
    """Seconds of a round in which at least one client of a process was training, being scored, or either."""

    train_s: float
    eval_s: float
    either_s: float


def work_of(result: RoundResult) -> dict[int, Work]:
    """The work of each process in a round of training, by process index. A client trains as soon as it is scored."""
    training: dict[int, list[tuple[float, float]]] = defaultdict(list)
    scoring: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for host, client in zip(result.host_of, result.clients, strict=True):
        assert client.train_s is not None
        assert client.train_started is not None
        scoring[host].append((client.train_started - client.eval_s, client.train_started))
        training[host].append((client.train_started, client.train_started + client.train_s))
    return {
        host: Work(covered(training[host]), covered(scoring[host]), covered(training[host] + scoring[host]))
        for host in training
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of time spans, each (start, end): where spans overlap, time counts once."""
    total, covered_until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return total


@dataclass(frozen=True)
class DeviceUse:
    """How a device was used over a period of time.

    Attributes:
        share: the share of the period in which the device executed at least one operation.
        operations: the number of kernels, copies and fills.
        seen_until: the end of the last operation that the profiler saw, as a share of the period.
    """

    share: float
    operations: int
    seen_until: float


def device_use(device: torch.device, work: Callable[[], object]) -> DeviceUse:
    """Measure how busy `work` keeps a device, with PyTorch's profiler.

    The profiler slows down the launching of kernels, so the share is more likely too small than too large. It may miss
    operations at its beginning, which is why other operations come first, or at its end: compare the number of
    operations with that of other runs.

    Raises:
        RuntimeError: the profiler saw no operation, because it has no access to the device's events.
    """
    activity, kind = _KINDS[device.type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning: Profiler clears events")  # there is only one cycle
        profiler = profile(activities=[activity])
        with profiler:
            for _ in range(100):
                torch.ones(1000, device=device).sum()
            _wait_for(device)
            started = time.time_ns()
            work()
            _wait_for(device)
            ended = time.time_ns()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()  # raw: building PyTorch's own tables of them takes minutes
    spans = [
        (max(started, event.start_ns()), min(ended, event.end_ns()))
        for event in events
        if event.device_type() == kind and event.start_ns() < ended and event.end_ns() > started
    ]
    if not spans:
        raise RuntimeError(
            f"PyTorch's profiler saw nothing on {device}; for a GPU it needs CUPTI and the permission to use it"
        )
    last = max(end for _, end in spans)
    return DeviceUse(covered(spans) / (ended - started), len(spans), (last - started) / (ended - started))


@contextmanager
def utilization(device: torch.device) -> Iterator[dict[str, object]]:
    """Sample a GPU's utilization and memory with nvidia-smi during a `with` block, over all processes together.

    Yields:
        A dictionary that is filled when the block ends. samples: the number of samples; utilization: the percentage of
        time in which a kernel ran, median over the samples; least_utilization: the smallest sample; memory_mib: the
        most memory in use. If nvidia-smi fails, it has only error: the reason.
    """
    result: dict[str, object] = {}
    query = ["--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "--loop-ms=200"]
    with tempfile.TemporaryFile("w+") as output:
        try:
            identity = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
            sampler = subprocess.Popen(["nvidia-smi", identity, *query], stdout=output, stderr=subprocess.STDOUT)
        except (OSError, RuntimeError) as error:
            yield result
            result["error"] = str(error)
            return
        try:
            yield result
        finally:
            sampler.terminate()
            sampler.wait()
        output.seek(0)
        text = output.read()
    samples = re.findall(r"^(\d+), (\d+)$", text, re.MULTILINE)
    if samples:
        busy, memory = ([int(number) for number in column] for column in zip(*samples, strict=True))
        result |= {
            "samples": len(samples),
            "utilization": statistics.median(busy),
            "least_utilization": min(busy),
            "memory_mib": max(memory),
        }
    else:
        result["error"] = text.strip() or "nvidia-smi took no sample"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""How much of a time a device, or a process, was at work."""

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
    """Seconds of a round in which at least one client of a process trained, was scored, or did either."""

    train_s: float
    eval_s: float
    either_s: float


def work_of(result: RoundResult) -> dict[int, Work]:
    """The work of each process in a round of training, by number. A client trains as soon as it is scored."""
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
    """How long at least one of some spans of time, (start, end), lasts. Those that overlap count once."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


@dataclass(frozen=True)
class DeviceUse:
    """How a device was used for some time.

    Attributes:
        share: of the time, in which it did at least one thing.
        operations: kernels, copies and fills.
        seen_until: part of the time after which the profiler saw no more.
    """

    share: float
    operations: int
    seen_until: float


def device_use(device: torch.device, work: Callable[[], object]) -> DeviceUse:
    """How busy some work keeps its device, as PyTorch's profiler sees it.

    The profiler slows down what launches kernels, so the share is rather too small than too large. It may miss some, at
    its beginning, so something else goes first, or at its end: compare the number of operations with other runs'.

    Raises:
        RuntimeError: it saw nothing, because it could not look.
    """
    activity, kind = _KINDS[device.type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning: Profiler clears events")  # there is one cycle
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
    seen = profiler.profiler.kineto_results.events()  # as they came; PyTorch's own tables of them take minutes
    spans = [
        (max(started, event.start_ns()), min(ended, event.end_ns()))
        for event in seen
        if event.device_type() == kind and event.start_ns() < ended and event.end_ns() > started
    ]
    if not spans:
        raise RuntimeError(
            f"PyTorch's profiler saw nothing on {device}; for a GPU it needs CUPTI and the right to use it"
        )
    last = max(end for _, end in spans)
    return DeviceUse(covered(spans) / (ended - started), len(spans), (last - started) / (ended - started))


@contextmanager
def utilization(device: torch.device) -> Iterator[dict[str, object]]:
    """Sample what a GPU's driver says of it for the length of a `with` block, of all processes together.

    Yields:
        A dictionary that is filled when the block ends. samples: how many were taken; utilization: percent of the time
        in which a kernel ran, their median; least_utilization; memory_mib: the most in use. Or error, if nvidia-smi
        can't be asked.
    """
    result: dict[str, object] = {}
    query = ["--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "--loop-ms=200"]
    with tempfile.TemporaryFile("w+") as output:
        try:
            identity = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
            sampler = subprocess.Popen(["nvidia-smi", identity, *query], stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
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

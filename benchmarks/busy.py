"""How much of a time a device, or a process, was at work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
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


def device_share(device: torch.device, work: Callable[[], object]) -> float:
    """Which part of the time of some work its device was busy with at least one kernel, as PyTorch's profiler sees it.

    The profiler slows down what launches kernels, so the share is rather too small than too large.

    Raises:
        RuntimeError: it saw nothing, because it could not look.
    """
    activity, kind = _KINDS[device.type]
    with profile(activities=[activity], acc_events=True) as profiler:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    events = [event.time_range for event in profiler.events() or () if event.device_type == kind]
    if not events:
        raise RuntimeError(
            f"PyTorch's profiler saw nothing on {device}; for a GPU it needs CUPTI and the right to use it"
        )
    return covered((event.start, event.end) for event in events) / 1e6 / seconds

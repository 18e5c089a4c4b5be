"""How much of a time a device, or a process, was at work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_KINDS = {"cpu": (ProfilerActivity.CPU, DeviceType.CPU), "cuda": (ProfilerActivity.CUDA, DeviceType.CUDA)}


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
    """
    activity, kind = _KINDS[device.type]
    with profile(activities=[activity], acc_events=True) as profiler:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    events = [event.time_range for event in profiler.events() or () if event.device_type == kind]
    return covered((event.start, event.end) for event in events) / 1e6 / seconds

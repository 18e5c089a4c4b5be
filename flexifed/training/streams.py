"""Overlapping computations on the GPU of one process, each on a CUDA stream of its own.

A step of a computation queues work and returns before the work is done. One thread is therefore enough: it lets each
computation queue a step in turn, and the GPU works on all of them. On a CPU, where a step has finished when it returns,
computations alternate.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A computation that yields after each step, so that others can take a step, and returns a result."""


class Stream:
    """What overlapping computations must not share: a CUDA stream, and the state of PyTorch's global generators.

    Args:
        device: where the computation runs. A CPU has no streams; only the generator states are kept apart.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._random_state = _random_state(device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Queue work on this stream, with the generators in the state in which this stream last left them."""
        _set_random_state(self._device, self._random_state)
        with torch.cuda.stream(self._stream):
            yield
        self._random_state = _random_state(self._device)

    def begin(self) -> None:
        """Let work that is queued on this stream from now on wait for all work queued outside."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        """Let work that is queued outside from now on wait for all work queued on this stream."""
        if self._stream:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


def run_to_end(computation: Steps[T]) -> T:
    """Take all steps of a computation, and return its result."""
    while True:
        try:
            next(computation)
        except StopIteration as done:
            result: T = done.value
            return result


def overlap(computations: Sequence[Steps[T]], streams: Sequence[Stream]) -> list[T]:
    """Run computations so that they overlap: one step of each in turn, until all are done.

    The global generators are restored afterwards.

    Args:
        computations: at most as many as streams. A single computation runs without a stream.
        streams: streams of one device.

    Returns:
        The results, in the order of the computations.
    """
    if len(computations) == 1:
        return [run_to_end(computations[0])]
    device = streams[0]._device
    random_state = _random_state(device)
    unfinished = dict(enumerate(zip(computations, streams, strict=False)))
    results: dict[int, T] = {}
    try:
        for stream in streams:
            stream.begin()
        while unfinished:
            for index, (computation, stream) in list(unfinished.items()):
                with stream.active():
                    try:
                        next(computation)
                    except StopIteration as done:
                        results[index] = done.value
                        del unfinished[index]
    finally:
        for stream in streams:
            stream.end()
        for computation in computations:
            computation.close()  # if one has failed, end the others now
        _set_random_state(device, random_state)
    return [results[index] for index in range(len(computations))]


def _random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """The states of the global generators from which a computation on a device draws."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: tuple[torch.Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)

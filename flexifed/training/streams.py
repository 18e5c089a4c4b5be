"""Computations of one process that overlap on its GPU, each on a CUDA stream of its own.

A step of a computation queues work and returns before it is done. So one thread is enough: it lets each computation
queue a step in turn, and the GPU works on all of them. On a CPU, where a step is done when it returns, they take turns.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A computation that yields after each step, when another may have its turn, and returns what it came to."""


class Stream:
    """What computations that overlap must not share: a CUDA stream, and the state of PyTorch's global generators.

    Args:
        device: a CPU has no streams, and only the generators are kept apart.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._random_state = _random_state(device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Queue work here, and draw from the generators as if nobody else had drawn since."""
        _set_random_state(self._device, self._random_state)
        with torch.cuda.stream(self._stream):
            yield
        self._random_state = _random_state(self._device)

    def begin(self) -> None:
        """Let what is queued here from now on wait for all that was queued outside."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        """Let what is queued outside from now on wait for all that was queued here."""
        if self._stream:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


def run_to_end(computation: Steps[T]) -> T:
    """Take all steps of a computation, and return what it comes to."""
    while True:
        try:
            next(computation)
        except StopIteration as done:
            result: T = done.value
            return result


def overlap(computations: Sequence[Steps[T]], streams: Sequence[Stream]) -> list[T]:
    """Let computations overlap: a step of each in turn until all are done. The global generators are left as they were.

    Args:
        computations: at most one for each stream. One alone needs none, and has none.
        streams: of one device.

    Returns:
        What each came to, in their order.
    """
    if len(computations) == 1:
        return [run_to_end(computations[0])]
    device = streams[0]._device
    before = _random_state(device)
    unfinished = dict(enumerate(zip(computations, streams, strict=False)))
    results: dict[int, T] = {}
    try:
        for stream in streams:
            stream.begin()
        while unfinished:
            for index, (computation, stream) in list(unfinished.items()):
                with stream.entered():
                    try:
                        next(computation)
                    except StopIteration as done:
                        results[index] = done.value
                        del unfinished[index]
    finally:
        for stream in streams:
            stream.end()
        for computation in computations:
            computation.close()  # where one has failed, the others end here and now
        _set_random_state(device, before)
    return [results[index] for index in range(len(computations))]


def _random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Of the global generators that a computation on a device draws from."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: tuple[torch.Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)

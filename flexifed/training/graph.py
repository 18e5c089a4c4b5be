"""Training steps that are recorded once and then replayed, so that a GPU gets all kernels of a step in one launch.

A recording holds addresses, not values: all tensors that it reads or writes must stay where they are. A replay runs no
Python (https://docs.pytorch.org/docs/2.11/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from flexifed.training.step import Step

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Records some work, for which it may run it any number of times, and returns a function that repeats the work on the
same memory."""

_WARM_UP = 3  # runs before a recording: libraries allocate memory and choose kernels, as PyTorch's notes advise


class CudaGraphs:
    """Records CUDA graphs that share one memory pool, and therefore must not be replayed at the same time.

    Graphs of different instances can be replayed at the same time (`flexifed.training.streams`). PyTorch would let all
    graphs of a process share the memory for the seed and offset of their random draws, and graphs that were recorded on
    one stream share cuBLAS's workspace; here each instance has its own.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._generator = torch.cuda.default_generators[torch.cuda.current_device()]
        self._draws = self._generator.clone_state()

    def __call__(self, work: Callable[[], None]) -> Replay:
        """Run the work to warm up, then record it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with self._isolated(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

        def replay() -> None:
            self._draws.set_state(self._generator.get_state())
            graph.replay()
            self._generator.set_state(self._draws.get_state())

        return replay

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """Record with this instance's own generator state, and without cuBLAS's existing workspaces."""
        state = self._generator.graphsafe_get_state()
        self._generator.graphsafe_set_state(self._draws)
        torch._C._cuda_clearCublasWorkspaces()
        try:
            yield
        finally:
            torch._C._cuda_clearCublasWorkspaces()
            self._generator.graphsafe_set_state(state)


class RecordedStep:
    """A step that is recorded when a batch size first occurs, and replayed from then on.

    Dropout draws the same random numbers as without a recording.

    Args:
        step: the step to record. Its tensors must stay where they are for the lifetime of this object.
        record: records the step's work.
    """

    def __init__(self, step: Step, record: Record) -> None:
        self._step = step
        self._record = record
        self._recordings: dict[torch.Size, tuple[torch.Tensor, torch.Tensor, Replay]] = {}

    @property
    def loss_sum(self) -> torch.Tensor:
        """See `Step`."""
        return self._step.loss_sum

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Take a step; see `Step`."""
        if inputs.shape not in self._recordings:
            self._recordings[inputs.shape] = self._recording(inputs, targets)
        recorded_inputs, recorded_targets, replay = self._recordings[inputs.shape]
        recorded_inputs.copy_(inputs)
        recorded_targets.copy_(targets)
        replay()

    def reset(self) -> None:
        """Start again as with a fresh optimizer; recordings are kept."""
        self._step.reset()

    @torch.no_grad()
    def _recording(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Replay]:
        """Record a step on a copy of a batch, then restore all values and random generators."""
        inputs, targets = inputs.clone(), targets.clone()
        before = [tensor.clone() for tensor in self._step.tensors()]
        with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []), torch.enable_grad():
            replay = self._record(lambda: self._step(inputs, targets))
        for tensor, value in zip(self._step.tensors(), before, strict=True):
            tensor.copy_(value)
        return inputs, targets, replay

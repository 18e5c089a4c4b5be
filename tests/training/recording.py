"""A CUDA graph's semantics on CPUs: the operators of one run, repeated on the very tensors of that run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flexifed.training.graph import Replay

aten = torch.ops.aten
_FROM_PYTHON = {aten.lift_fresh.default, aten.lift.default}  # torch.tensor(3.0): on a GPU a copy from the host


class CaptureError(RuntimeError):
    """An operation that a CUDA stream refuses while it is captured."""


@dataclass(frozen=True)
class Operator:
    """An operator that was run, its arguments, and those of its results that were new memory, by position."""

    function: Any
    args: Any
    kwargs: Any
    made: dict[int, torch.Tensor]

    def spoil(self) -> None:
        """Fill the operator's new tensors with garbage, as other work does with memory that was free in between."""
        for tensor in self.made.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    def run_again(self) -> None:
        """Run the operator on the current values. Results that are arguments or views of them need no copy."""
        results = tree_leaves(self.function(*self.args, **self.kwargs))
        for position, place in self.made.items():
            place.copy_(results[position])


class _Recorder(TorchDispatchMode):
    """Records all operators below autograd and autocast, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        needs_values = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        if needs_values or function in _FROM_PYTHON:
            raise CaptureError(f"{function} waits for the device, or copies from the host to it")
        args, kwargs = tree_map(
            lambda leaf: leaf, (args, kwargs)
        )  # with lists of its own: the caller may change theirs
        results = function(*args, **kwargs)
        given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = {
            position: leaf
            for position, leaf in enumerate(tree_leaves(results))
            if isinstance(leaf, torch.Tensor) and _memory(leaf) not in given
        }
        self.operators.append(Operator(function, args, kwargs, made))
        return results


class CpuRecorder:
    """Records work as `flexifed.training.graph.CudaGraphs` does.

    A replay runs no Python, and begins with garbage in all tensors that were created during the recording: it can rely
    only on tensors that existed before, and on what it writes itself.
    """

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, work: Callable[[], None]) -> Replay:
        work()  # as a warm-up does, it changes values and draws from generators
        with _Recorder() as recorder:
            work()
        self.recorded += 1

        @torch.no_grad()
        def replay() -> None:
            self.replayed += 1
            for operator in recorder.operators:
                operator.spoil()
            for operator in recorder.operators:
                operator.run_again()

        return replay


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata

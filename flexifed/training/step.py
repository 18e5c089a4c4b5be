"""A step of plain mini-batch SGD."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import nn
from torch.nn import functional
from torch.optim.sgd import sgd

from flexifed.config import NumericsConfig, TrainingConfig
from flexifed.training.numerics import autocast


class Step:
    """Steps of a fresh optimizer.

    A step neither waits for the device nor leaves new tensors behind, and after the first one nothing but values
    changes: so it can be recorded (`flexifed.training.graph`).

    The optimizer is the function under `torch.optim.SGD`. An instance of that class imports torch.compile when it is
    made, which takes each process a second and a hundred megabytes.

    Args:
        model: trained in place; a step must reach all of its parameters.
        config: SGD's settings.
        numerics: precision, and how the optimizer steps.

    Attributes:
        loss_sum: float64 (), on the model's device: cross-entropy as seen while training, over all samples.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, numerics: NumericsConfig) -> None:
        self._model = model
        self._numerics = numerics
        self._parameters: list[torch.Tensor] = list(model.parameters())
        self._momentum: list[torch.Tensor | None] = [None] * len(self._parameters) if config.momentum else []
        device = self._parameters[0].device
        self._sgd = partial(
            sgd,
            fused=device.type == "cuda" if numerics.fused is None else numerics.fused,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Take a step.

        Args:
            inputs: what the model takes, (batch, ...).
            targets: int64 (batch,).
        """
        with autocast(self._numerics, inputs.device):
            loss = functional.cross_entropy(self._model(inputs), targets)
        loss.backward()
        gradients = cast(list[torch.Tensor], [parameter.grad for parameter in self._parameters])
        with torch.no_grad():
            self._sgd(self._parameters, gradients, self._momentum)
        for parameter in self._parameters:
            parameter.grad = None  # its memory is for the next step, or for whoever trains next
        self.loss_sum += loss.detach() * len(targets)

    def reset(self) -> None:
        """Begin again as a fresh optimizer would, in the same memory.

        A fresh optimizer's first step takes the gradient as its momentum; from a momentum of zero that is what comes
        out too.
        """
        self.loss_sum.zero_()
        if self._momentum:
            pairs = zip(self._parameters, self._momentum, strict=True)
            buffers = [torch.empty_like(parameter) if buffer is None else buffer for parameter, buffer in pairs]
            torch._foreach_zero_(buffers)
            self._momentum[:] = buffers

    def tensors(self) -> list[torch.Tensor]:
        """All that a step changes: the model, the optimizer's momentum, and the sum of losses."""
        momentum = [buffer for buffer in self._momentum if buffer is not None]
        return [*self._parameters, *self._model.buffers(), *momentum, self.loss_sum]

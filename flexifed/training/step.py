"""One step of plain mini-batch SGD."""

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
    """Takes training steps with a fresh optimizer.

    A step neither waits for the device nor leaves new tensors behind, and from the second step on only values change.
    It can therefore be recorded (`flexifed.training.graph`).

    The optimizer is the function on which `torch.optim.SGD` is built. To create an instance of that class would import
    torch.compile, which takes each process a second and a hundred megabytes.

    Args:
        model: trained in place; every parameter must get a gradient in a step.
        config: SGD's settings.
        numerics: precision, and whether the optimizer is fused.

    Attributes:
        loss_sum: float64 (), on the model's device: sum of the cross-entropy over all samples, as seen while training.
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
            inputs: the model's inputs, (batch, ...).
            targets: int64 (batch,).
        """
        with autocast(self._numerics, inputs.device):
            loss = functional.cross_entropy(self._model(inputs), targets)
        loss.backward()
        gradients = cast(list[torch.Tensor], [parameter.grad for parameter in self._parameters])
        with torch.no_grad():
            self._sgd(self._parameters, gradients, self._momentum)
        for parameter in self._parameters:
            parameter.grad = None  # frees its memory for the next step, or for the next model to be trained
        self.loss_sum += loss.detach() * len(targets)

    def reset(self) -> None:
        """Start again as with a fresh optimizer, in the same memory.

        A fresh optimizer's first step uses the gradient as momentum. With a momentum of zero the result is the same.
        """
        self.loss_sum.zero_()
        if self._momentum:
            pairs = zip(self._parameters, self._momentum, strict=True)
            buffers = [torch.empty_like(parameter) if buffer is None else buffer for parameter, buffer in pairs]
            torch._foreach_zero_(buffers)
            self._momentum[:] = buffers

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that a step changes: the model's, the optimizer's momentum, and the sum of losses."""
        momentum = [buffer for buffer in self._momentum if buffer is not None]
        return [*self._parameters, *self._model.buffers(), *momentum, self.loss_sum]

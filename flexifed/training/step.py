"""A step of plain mini-batch SGD."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from flexifed.config import NumericsConfig, TrainingConfig
from flexifed.training.numerics import autocast


class Step:
    """Steps of a fresh optimizer.

    A step neither waits for the device nor leaves new tensors behind, and after the first one nothing but values
    changes: so it can be recorded (`flexifed.training.graph`).

    Args:
        model: trained in place.
        config: SGD's settings.
        numerics: precision, and how the optimizer steps.

    Attributes:
        loss_sum: float64 (), on the model's device: cross-entropy as seen while training, over all samples.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, numerics: NumericsConfig) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._numerics = numerics
        self._optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=device.type == "cuda" if numerics.fused is None else numerics.fused,
        )
        self._has_momentum = config.momentum > 0
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
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)  # their memory is for the next step, or for whoever trains next
        self.loss_sum += loss.detach() * len(targets)

    def reset(self) -> None:
        """Begin again as a fresh optimizer would, in the same memory.

        A fresh optimizer's first step takes the gradient as its momentum; from a momentum of zero that is what comes
        out too.
        """
        self.loss_sum.zero_()
        if self._has_momentum:
            states = [self._optimizer.state[parameter] for parameter in self._model.parameters()]
            for parameter, state in zip(self._model.parameters(), states, strict=True):
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.empty_like(parameter)
            torch._foreach_zero_([state["momentum_buffer"] for state in states])

    def tensors(self) -> list[torch.Tensor]:
        """All that a step changes: the model, the optimizer's momentum, and the sum of losses."""
        momentum = [buffer for state in self._optimizer.state.values() for buffer in state.values()]
        return [*self._model.parameters(), *self._model.buffers(), *momentum, self.loss_sum]

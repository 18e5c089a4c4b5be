"""The workspace that clients of one architecture share, one at a time."""

from __future__ import annotations

from torch import nn

from flexifed.config import NumericsConfig, TrainingConfig
from flexifed.training.graph import CudaGraphs, Record, RecordedStep
from flexifed.training.step import Step
from flexifed.training.winograd import use_winograd


class Workspace:
    """A model that holds the values of one client at a time, and the settings with which it is trained.

    Args:
        model: on its device. Its tensors stay where they are, and clients' values are copied into them. The class of
            some convolutions may change (`use_winograd`).
        config: epochs, batch size, and SGD's settings.
        numerics: precision, and whether the optimizer is fused and steps are recorded. Settings of the whole process
            are those of `numeric_settings`.
        record: records a step, if `numerics` asks for that. Default: as a CUDA graph.
    """

    def __init__(
        self, model: nn.Module, config: TrainingConfig, numerics: NumericsConfig, record: Record | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.numerics = numerics
        self.device = next(model.parameters()).device
        if numerics.uses_winograd(self.device.type):
            use_winograd(model)
        self._recorded = RecordedStep(self._fresh_step(), record or CudaGraphs()) if numerics.cuda_graph else None

    def begin_training(self) -> Step | RecordedStep:
        """A step with a fresh optimizer. If steps are recorded, existing recordings are kept."""
        if self._recorded is None:
            return self._fresh_step()
        self._recorded.reset()
        return self._recorded

    def _fresh_step(self) -> Step:
        return Step(self.model, self.config, self.numerics)

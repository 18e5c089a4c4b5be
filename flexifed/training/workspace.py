"""What clients of one architecture take turns in."""

from __future__ import annotations

from torch import nn

from flexifed.config import NumericsConfig, TrainingConfig
from flexifed.training.graph import CudaGraphs, Record, RecordedStep
from flexifed.training.step import Step
from flexifed.training.winograd import use_winograd


class Workspace:
    """A model whose values are whoever's turn it is, and how it is trained.

    Args:
        model: on its device, where its tensors stay: values are copied into them. Its convolutions may be given
            another class.
        config: epochs, batch size, and SGD's settings.
        numerics: precision, how the optimizer steps, and whether steps are recorded; what holds for the whole process
            is `numeric_settings`.
        record: how a step is recorded. Default: as a CUDA graph.
    """

    def __init__(
        self, model: nn.Module, config: TrainingConfig, numerics: NumericsConfig, record: Record | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.numerics = numerics
        self.device = next(model.parameters()).device
        if numerics.by_winograd(self.device.type):
            use_winograd(model)
        self._recorded = RecordedStep(self._fresh_step(), record or CudaGraphs()) if numerics.cuda_graph else None

    def begin(self) -> Step | RecordedStep:
        """Steps of a fresh optimizer; of those that are recorded, the recordings are kept."""
        if self._recorded is None:
            return self._fresh_step()
        self._recorded.reset()
        return self._recorded

    def _fresh_step(self) -> Step:
        return Step(self.model, self.config, self.numerics)

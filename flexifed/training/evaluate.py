"""The score of a model on a client's test shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from flexifed.config import NumericsConfig, TrainingConfig
from flexifed.data import Pipeline
from flexifed.training.numerics import autocast
from flexifed.training.streams import Steps


@dataclass(frozen=True)
class Score:
    """Accuracy in 0 to 1, and the mean cross-entropy over the samples, in nats."""

    accuracy: float
    loss: float


def evaluate(
    model: nn.Module,
    samples: torch.Tensor,
    labels: torch.Tensor,
    *,
    config: TrainingConfig,
    numerics: NumericsConfig,
    pipeline: Pipeline,
) -> Steps[Score]:
    """Score a model, and leave it as it was; others may have their turn before the score is waited for.

    With `config.scoring == "train"` the model is scored as the published program does it: dropout is active (it draws
    from PyTorch's global generator: seed it around this call) and batch norm uses the statistics of the batch. Here the
    running statistics that such a pass moves are put back, because a score must not change what a client holds; there
    they stay moved, and are averaged, but never read.

    Args:
        model: on the device of the data.
        samples: as they are stored, (count, ...).
        labels: int64 (count,).
        config: scoring mode and batch size.
        numerics: precision; what holds for the whole process is `numeric_settings`.
        pipeline: makes inputs of them.
    """
    in_training_mode = config.scoring == "train"
    with torch.no_grad():
        before = [buffer.clone() for buffer in model.buffers()] if in_training_mode else []
        model.train(in_training_mode)
        sums = torch.zeros(2, dtype=torch.float64, device=samples.device)
        for stored, targets in zip(
            samples.split(config.eval_batch_size), labels.split(config.eval_batch_size), strict=True
        ):
            with autocast(numerics, samples.device):
                scores = model(pipeline.prepare(stored))
            sums[0] += (scores.argmax(1) == targets).sum()
            sums[1] += functional.cross_entropy(scores.float(), targets, reduction="sum")
        if in_training_mode:
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
    yield
    correct, loss = sums.tolist()
    return Score(accuracy=correct / len(samples), loss=loss / len(samples))

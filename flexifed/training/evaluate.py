"""The score of a model on a client's test shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from flexifed.data import Pipeline
from flexifed.training.numerics import autocast
from flexifed.training.streams import Steps
from flexifed.training.workspace import Workspace


@dataclass(frozen=True)
class Score:
    """The accuracy, from 0 to 1, and the mean cross-entropy of the samples, in nats."""

    accuracy: float
    loss: float


def evaluate(
    workspace: Workspace,
    samples: torch.Tensor,
    labels: torch.Tensor,
    *,
    pipeline: Pipeline,
) -> Steps[Score]:
    """Score a workspace's model without changing it. Yields once, before it waits for the score.

    With `scoring="train"` in the workspace's config the model is scored as the published program does it: dropout is
    active (it draws from PyTorch's global generator, so seed that around this call) and batch norm uses the statistics
    of the batch. Such a pass updates the running statistics. Here they are restored, because scoring must not change
    what a client holds; the published program leaves them updated and averages them, but never reads them.

    Args:
        workspace: the model, on the device of the data, the scoring mode, the batch size and the precision. Settings
            of the whole process are those of `numeric_settings`.
        samples: as stored, (count, ...).
        labels: int64 (count,).
        pipeline: turns samples into inputs.
    """
    model, config = workspace.model, workspace.config
    in_training_mode = config.scoring == "train"
    with torch.no_grad():
        before = [buffer.clone() for buffer in model.buffers()] if in_training_mode else []
        model.train(in_training_mode)
        sums = torch.zeros(2, dtype=torch.float64, device=samples.device)
        for stored, targets in zip(
            samples.split(config.eval_batch_size), labels.split(config.eval_batch_size), strict=True
        ):
            with autocast(workspace.numerics, samples.device):
                scores = model(pipeline.prepare(stored))
            sums[0] += (scores.argmax(1) == targets).sum()
            sums[1] += functional.cross_entropy(scores.float(), targets, reduction="sum")
        if in_training_mode:
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
    yield
    correct, loss = sums.tolist()
    return Score(accuracy=correct / len(samples), loss=loss / len(samples))

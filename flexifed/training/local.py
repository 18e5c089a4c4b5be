"""A client's local epochs: plain mini-batch SGD, as in the published program."""

from __future__ import annotations

import torch

from flexifed.data import Pipeline
from flexifed.training.batches import epoch_batches
from flexifed.training.streams import Steps
from flexifed.training.workspace import Workspace


def train(
    workspace: Workspace,
    samples: torch.Tensor,
    labels: torch.Tensor,
    *,
    pipeline: Pipeline,
    batches: torch.Generator,
    augmentation: torch.Generator,
) -> Steps[torch.Tensor]:
    """Train a workspace's model in place with a fresh optimizer. Yields after each step.

    Dropout draws from PyTorch's global generator, so seed that around this call.

    Args:
        workspace: the model, on the device of the data, and all settings.
        samples: as stored, (count, ...).
        labels: int64 (count,).
        pipeline: turns samples into inputs, augmented if the config says so.
        batches: CPU generator of the order of samples, one permutation for each epoch.
        augmentation: CPU generator of the augmentation.

    Returns:
        Mean cross-entropy over all samples and epochs, as seen while training: float64 (), on the model's device. A GPU
        may still be computing it.
    """
    config = workspace.config
    # On a GPU a whole epoch, so that steps need not launch kernels for it; on a CPU a batch, which stays in the caches.
    prepared_at_once = len(samples) if samples.is_cuda else config.batch_size
    workspace.model.train()
    step = workspace.begin_training()
    for _ in range(config.local_epochs):
        epoch = epoch_batches(
            samples,
            labels,
            config=config,
            pipeline=pipeline,
            batches=batches,
            augmentation=augmentation,
            prepared_at_once=prepared_at_once,
        )
        for inputs, targets in epoch:
            step(inputs, targets)
            yield
    return step.loss_sum / (config.local_epochs * len(samples))

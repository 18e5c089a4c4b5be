"""A client's local epochs: plain mini-batch SGD, as in the published program."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from flexifed.config import NumericsConfig, TrainingConfig
from flexifed.data import Pipeline
from flexifed.training.batches import epoch_batches
from flexifed.training.numerics import autocast
from flexifed.training.streams import Steps


def train(
    model: nn.Module,
    samples: torch.Tensor,
    labels: torch.Tensor,
    *,
    config: TrainingConfig,
    numerics: NumericsConfig,
    pipeline: Pipeline,
    batches: torch.Generator,
    augmentation: torch.Generator,
) -> Steps[float]:
    """Train a model in place with a fresh optimizer, a step at a time.

    Dropout draws from PyTorch's global generator: seed it around this call.

    Args:
        model: on the device of the data.
        samples: as they are stored, (count, ...).
        labels: int64 (count,).
        config: epochs, batch size, and SGD's settings.
        numerics: precision, and how the optimizer steps; what holds for the whole process is `numeric_settings`.
        pipeline: makes inputs of them, with variation if the config says so.
        batches: CPU generator of the order of samples, one permutation an epoch.
        augmentation: CPU generator of that variation.

    Returns:
        Mean cross-entropy over all samples and epochs, as seen while training.
    """
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=samples.is_cuda if numerics.fused is None else numerics.fused,
    )
    # On a GPU a whole epoch, so that a step need not launch it; on a CPU a batch, which then lies in its caches.
    prepared_at_once = len(samples) if samples.is_cuda else config.batch_size
    total = torch.zeros((), dtype=torch.float64, device=samples.device)
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
            optimizer.zero_grad(set_to_none=True)
            with autocast(numerics, samples.device):
                loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(targets)
            yield
    model.zero_grad(set_to_none=True)  # the gradients' memory is for whoever trains next
    return total.item() / (config.local_epochs * len(samples))

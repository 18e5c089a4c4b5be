"""A client's local epochs: plain mini-batch SGD, as in the published program."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from flexifed.config import TrainingConfig
from flexifed.data.augment import ImagePipeline


def train(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    config: TrainingConfig,
    pipeline: ImagePipeline,
    batches: torch.Generator,
    augmentation: torch.Generator,
) -> float:
    """Train a model in place with a fresh optimizer.

    Dropout draws from PyTorch's global generator: seed it around this call.

    Args:
        model: on the device of the data.
        images: uint8 (samples, channels, height, width).
        labels: int64 (samples,).
        config: epochs, batch size, and SGD's settings.
        pipeline: augments (if the config says so) and normalises.
        batches: CPU generator of the order of samples, one permutation an epoch.
        augmentation: CPU generator of crops and flips.

    Returns:
        Mean cross-entropy over all samples and epochs, as seen while training.
    """
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    total = torch.zeros((), dtype=torch.float64, device=images.device)
    for _ in range(config.local_epochs):
        order = torch.randperm(len(images), generator=batches).to(images.device)
        for batch in order.split(config.batch_size):
            inputs = images[batch]
            inputs = pipeline.augment(inputs, augmentation) if config.augment else pipeline.normalise(inputs)
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(model(inputs), labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
    model.zero_grad(set_to_none=True)  # the gradients' memory is for whoever trains next
    return total.item() / (config.local_epochs * len(images))

"""The batches of an epoch: inputs and labels in random order, augmented if the config says so."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flexifed.config import TrainingConfig
from flexifed.data import Pipeline


def epoch_batches(
    samples: torch.Tensor,
    labels: torch.Tensor,
    *,
    config: TrainingConfig,
    pipeline: Pipeline,
    batches: torch.Generator,
    augmentation: torch.Generator,
    prepared_at_once: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the inputs and labels of each batch, on the device of the samples.

    The random numbers for augmentation are drawn batch by batch and moved to the device together. The number of samples
    that are prepared at once does not change them.

    Args:
        samples: as stored, (count, ...).
        labels: int64 (count,).
        config: batch size, and whether to augment.
        pipeline: turns samples into inputs.
        batches: CPU generator of the order of samples, one permutation for each epoch.
        augmentation: CPU generator of the augmentation.
        prepared_at_once: number of samples to prepare at once, a multiple of the batch size, or all of them.
    """
    device, size = samples.device, config.batch_size
    order = torch.randperm(len(samples), generator=batches)
    drawn = [pipeline.draw(len(batch), augmentation) for batch in order.split(size)] if config.augment else []
    variation = [_to_device(torch.cat(draws), device) for draws in zip(*drawn, strict=True)]
    order = _to_device(order, device)
    for first in range(0, len(order), prepared_at_once):
        chunk = slice(first, first + prepared_at_once)
        stored, targets = samples[order[chunk]], labels[order[chunk]]
        if config.augment:
            inputs = pipeline.augment(stored, tuple(draws[chunk] for draws in variation))
        else:
            inputs = pipeline.prepare(stored)
        yield from zip(inputs.split(size), targets.split(size), strict=True)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a CPU tensor to a device. For a GPU the copy is queued, without waiting for the work before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

"""The batches of an epoch: inputs and labels in a random order, with their variation."""

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
    """Each batch's inputs and labels, on the device of the samples.

    Variation is drawn batch by batch, and moved in one go; how many samples are prepared at once changes no draw.

    Args:
        samples: as they are stored, (count, ...).
        labels: int64 (count,).
        config: batch size, and whether samples are varied.
        pipeline: makes inputs of them.
        batches: CPU generator of the order of samples, one permutation an epoch.
        augmentation: CPU generator of the variation.
        prepared_at_once: samples, a multiple of the batch size or all of them.
    """
    device, size = samples.device, config.batch_size
    order = torch.randperm(len(samples), generator=batches)
    drawn = [pipeline.draw(len(batch), augmentation) for batch in order.split(size)] if config.augment else []
    variation = [_moved(torch.cat(part), device) for part in zip(*drawn, strict=True)]
    order = _moved(order, device)
    for first in range(0, len(order), prepared_at_once):
        some = slice(first, first + prepared_at_once)
        stored, targets = samples[order[some]], labels[order[some]]
        if config.augment:
            inputs = pipeline.augment(stored, tuple(part[some] for part in variation))
        else:
            inputs = pipeline.prepare(stored)
        yield from zip(inputs.split(size), targets.split(size), strict=True)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on a device. A GPU copies it in its turn: nothing waits here for what it was given before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

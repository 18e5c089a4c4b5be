"""The baseline: a round as the published program plays it, one client after another, image by image.

Written from the program's description, not from its code: PIL transforms behind a DataLoader, a new model for every
client in every round, states passed on as deep copies, PyTorch's default threads and memory format, scoring in training
mode.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from flexifed.config import CellConfig
from flexifed.core.aggregate import State
from flexifed.core.schemes import SharingPlan
from flexifed.data import Dataset, Split
from flexifed.data.partition import window
from flexifed.federation.cell import ClientShards, cell_model, cell_plan


class Images(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images of a data set, each converted to a PIL image and transformed on access.

    Args:
        samples: the stored images of the data set.
        indices: the indices of the images to use.
        transform: makes a model's input of a PIL image.
    """

    def __init__(self, samples: Split, indices: np.ndarray, transform: transforms.Compose) -> None:
        images, labels = samples.take(indices)
        self._images = images.permute(0, 2, 3, 1).numpy()
        self._labels = labels.tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


class SequentialLoop:
    """Plays the clients of a cell one after another; its data are images.

    Args:
        config: the cell.
        data: the cell's data set.
        shards: the samples of each client.
    """

    def __init__(self, config: CellConfig, data: Dataset, shards: Sequence[ClientShards]) -> None:
        self._config = config
        self._data = data
        self._shards = shards
        self._device = torch.device(config.device)
        self._plan = cell_plan(config, data.info)
        self._states: list[dict[str, torch.Tensor]] = [
            self._build(client).state_dict() for client in range(len(shards))
        ]
        to_input = [transforms.ToTensor(), transforms.Normalize(data.info.mean, data.info.std)]
        self._plain = transforms.Compose(to_input)
        self._augmented = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *to_input]
        )

    def play_round(self, round_index: int) -> list[float]:
        """Score and train each client, then average what the plan shares; returns the scores."""
        scores = []
        for client, shards in enumerate(self._shards):
            model = self._build(client)
            model.load_state_dict(self._states[client])
            scores.append(self._score(model, shards.test))
            windows = self._config.partition.windows_per_shard
            self._train(model, window(shards.train, round_index, windows))
            self._states[client] = copy.deepcopy(model.state_dict())
        self._states = average_groups(self._plan, self._states)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return scores

    def _build(self, client: int) -> nn.Module:
        return cell_model(self._config, self._data.info, self._config.model_name(client)).to(self._device)

    @torch.no_grad()
    def _score(self, model: nn.Module, indices: np.ndarray) -> float:
        model.train()  # as the published program does, so that batch norm takes the statistics of each batch
        images = Images(self._data.test, indices, self._plain)
        correct = 0
        for inputs, labels in DataLoader(images, batch_size=self._config.training.batch_size):
            correct += (model(inputs.to(self._device)).argmax(1).cpu() == labels).sum().item()
        return correct / len(images)

    def _train(self, model: nn.Module, indices: np.ndarray) -> None:
        settings = self._config.training
        model.train()
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        images = Images(self._data.train, indices, self._augmented)
        for _ in range(settings.local_epochs):
            for inputs, labels in DataLoader(images, batch_size=settings.batch_size, shuffle=True):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs.to(self._device)), labels.to(self._device))
                loss.backward()
                optimizer.step()
                loss.item()


def average_groups(plan: SharingPlan, states: Sequence[State]) -> list[dict[str, torch.Tensor]]:
    """Replace each group's tensors by their plain mean, in copies of the states."""
    new_states = [copy.deepcopy(dict(state)) for state in states]
    for group in plan.groups:
        members = plan.members(group)
        names = [plan.shared_names(client)[group.index] for client in members]
        for position in range(len(group.specs)):
            tensors = [states[client][own[position]] for client, own in zip(members, names, strict=True)]
            mean = torch.stack(tensors).mean(0)
            for client, own in zip(members, names, strict=True):
                new_states[client][own[position]] = mean.clone()
    return new_states

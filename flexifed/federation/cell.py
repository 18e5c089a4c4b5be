"""What a cell's config and data set determine: shards, models, the sharing plan. Every process derives the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flexifed.config import CellConfig
from flexifed.core.schemes import Group, SharingPlan, sharing_plan
from flexifed.core.signature import signature
from flexifed.data import DatasetInfo, open_dataset
from flexifed.data.partition import dirichlet_proportions, iid_shards, shard_length, skewed_shards
from flexifed.errors import ConfigError
from flexifed.models import build_model
from flexifed.seeding import numpy_generator
from flexifed.training.workspace import Workspace


@dataclass(frozen=True)
class ClientShards:
    """A client's samples, as indices into the training set and the test set."""

    train: np.ndarray
    test: np.ndarray


def make_shards(config: CellConfig, info: DatasetInfo) -> list[ClientShards]:
    """Partition the training set and the test set with one generator, then cut each shard to its limit.

    Shards are i.i.d., and only the sizes of the sets are needed. With `dirichlet_alpha` labels are skewed, and the data
    are opened for their labels; a client's test shard has the proportions of its training shard.
    """
    generator = numpy_generator(config.seed, "partition")
    partition = config.partition
    num_shards, num_clients, alpha = partition.num_shards, partition.num_clients, partition.dirichlet_alpha
    if alpha is None:
        train_shards, test_shards = (
            iid_shards(count, num_shards, num_clients, generator, split=split)
            for count, split in ((info.num_train, "training"), (info.num_test, "test"))
        )
    else:
        data = open_dataset(info)
        labels = data.train.labels
        proportions = dirichlet_proportions(_class_counts(labels, info), num_clients, alpha, generator)
        train_shards = skewed_shards(labels, proportions, num_shards, generator, split="training")
        train_proportions = np.stack([_class_counts(labels[shard], info) / len(shard) for shard in train_shards])
        test_shards = skewed_shards(data.test.labels, train_proportions, num_shards, generator, split="test")
    return [
        ClientShards(train[: partition.max_train], test[: partition.max_test])
        for train, test in zip(train_shards, test_shards, strict=True)
    ]


def check_shards(shards: Sequence[ClientShards], config: CellConfig, info: DatasetInfo) -> None:
    """Check shards that do not come from `make_shards`.

    Raises:
        ConfigError: not a shard for each client, a client without samples, or samples that are no indices into the
            data set.
    """
    if len(shards) != config.partition.num_clients:
        raise ConfigError(f"{len(shards)} shards for {config.partition.num_clients} clients; give one for each client")
    for client, shard in enumerate(shards):
        if not isinstance(shard, ClientShards):
            raise ConfigError(f"the shard of client {client} is a {type(shard).__name__}; give a ClientShards")
        for split, indices, count in (("training", shard.train, info.num_train), ("test", shard.test, info.num_test)):
            samples = f"the {split} samples of client {client}"
            if not isinstance(indices, np.ndarray) or indices.ndim != 1 or indices.dtype.kind not in "iu":
                of = f" of {indices.dtype}, shape {indices.shape}" if isinstance(indices, np.ndarray) else ""
                raise ConfigError(
                    f"{samples} are a {type(indices).__name__}{of}; give their indices, a NumPy array of integers of "
                    "shape (n,), such as np.flatnonzero of a mask"
                )
            if not len(indices):
                raise ConfigError(f"{samples} are none; give each client at least one")
            if indices.min() < 0 or indices.max() >= count:
                raise ConfigError(
                    f"{samples} are {indices.min()} to {indices.max()}, but the data set has 0 to {count - 1}"
                )


def shard_sizes(config: CellConfig, info: DatasetInfo) -> tuple[int, int]:
    """Number of training and of test samples of each client: those of `make_shards`, without opening the data.

    Raises:
        DataError: there are fewer samples than shards.
    """
    partition = config.partition
    num_train, num_test = (
        shard_length(count, partition.num_shards, partition.num_clients, split=split)
        for count, split in ((info.num_train, "training"), (info.num_test, "test"))
    )
    return min(num_train, partition.max_train or num_train), min(num_test, partition.max_test or num_test)


def participants(config: CellConfig, round_index: int) -> frozenset[int]:
    """Draw the clients that take part in a round: all, or `clients_per_round` of them, without replacement."""
    num_clients, count = config.partition.num_clients, config.sharing.clients_per_round
    if count is None:
        return frozenset(range(num_clients))
    generator = numpy_generator(config.seed, "participants", round_index)
    return frozenset(generator.choice(num_clients, count, replace=False).tolist())


def trained_clients(config: CellConfig, next_round: int) -> frozenset[int]:
    """The clients that have taken part in a round before `next_round`."""
    trained: frozenset[int] = frozenset()
    for round_index in range(next_round):
        trained |= participants(config, round_index)
        if len(trained) == config.partition.num_clients:
            break
    return trained


def averaged_groups(config: CellConfig, plan: SharingPlan, next_round: int) -> Sequence[Group]:
    """The groups that have been averaged before `next_round`."""
    return plan.groups_with(trained_clients(config, next_round))


def _class_counts(labels: NDArray[np.int64], info: DatasetInfo) -> NDArray[np.int64]:
    """Number of samples of each class, shape (classes,)."""
    return np.bincount(labels, minlength=info.num_classes).astype(np.int64, copy=False)


def cell_model(
    config: CellConfig,
    info: DatasetInfo,
    name: str,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Build a model by its name, in the cell's width, for the data set's channels and classes; see `build_model`."""
    return build_model(
        name,
        num_classes=info.num_classes,
        in_channels=info.in_channels,
        width=config.model.width,
        generator=generator,
        device=device,
    )


def make_workspace(config: CellConfig, info: DatasetInfo, name: str) -> Workspace:
    """Build a workspace for clients with the model of this name. Its initial weights don't matter."""
    model = cell_model(config, info, name, device=config.device)
    if config.numerics.channels_last:
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return Workspace(model, config.training, config.numerics)


def cell_plan(config: CellConfig, info: DatasetInfo) -> SharingPlan:
    """Derive the sharing plan of a cell. Plans are never sent from process to process."""
    signatures = {name: signature(cell_model(config, info, name, device="meta")) for name in config.model_names}
    return sharing_plan(
        [signatures[config.model_name(client)] for client in range(config.partition.num_clients)],
        config.scheme,
        weighting=config.sharing.weighting,
        batch_norm_buffers=config.sharing.batch_norm_buffers,
        classifier=config.sharing.classifier,
    )


def state_bytes(config: CellConfig, info: DatasetInfo, next_round: int) -> int:
    """Size in bytes of a cell's state before `next_round`: each averaged group once, and what each client keeps.

    A client keeps its whole model until it has trained for the first time, then its personal tensors. So the state
    never grows.
    """
    plan, trained = cell_plan(config, info), trained_clients(config, next_round)
    size = sum(group.num_bytes for group in plan.groups_with(trained))
    for client, architecture in enumerate(plan.architecture_of):
        size += sum(spec.num_bytes for layer in plan.signatures[client].layers for spec in layer.tensors)
        if client in trained:
            size -= sum(group.num_bytes for group in plan.groups_of(architecture))
    return size


def client_weight(config: CellConfig, num_train: int) -> float:
    """A client's weight in a mean: its number of training samples (FedAvg), or 1."""
    return float(num_train) if config.sharing.weighting == "samples" else 1.0

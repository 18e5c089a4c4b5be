"""The job of `flower.py`, as both sides get it, and the programs with which Flower plays it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flexifed.config import CellConfig, ModelConfig
from flexifed.data import DatasetInfo, find_dataset
from flexifed.profiles import PROFILES, ProfileName

CPUS_PER_CLIENT = {"defaults": 2, "tutorial": 1, "lean": 1}
"""CPUs, and threads, of each client, by program of Flower. Flower's own default is two, flexifed's is one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """VGGs on CIFAR-10, averaged within each architecture; by default thin ones, with one local epoch in a round.

    Attributes:
        profile: the profile that decides shards, batches, steps and augmentation.
        clients: the number of clients; client k has version k modulo 4.
        rounds: the number of rounds of training.
        width: a factor on the number of channels of all layers.
        local_epochs: the number of epochs that a client trains in a round.
        max_train: the most training samples of a client; None for its whole shard, of which it trains on a part in
            each round.
        max_test: the most test samples of a client; None for its whole shard.
        seed: the root seed of all random numbers.
        cpus: the number of flexifed's clients that train at the same time, each with one thread; for Flower's clients
            see `CPUS_PER_CLIENT`.
        data_dir: a folder with CIFAR-10; None for its synthetic stand-in.
    """

    profile: ProfileName = "authors"
    clients: int = 8
    rounds: int = 10
    width: float = PROFILES["thin"].model.width
    local_epochs: int = 1
    max_train: int | None = None
    max_test: int | None = None
    seed: int = 0
    cpus: int = 2
    data_dir: str | None = None

    def config(self) -> CellConfig:
        """The cell of the job. Its scheme, `clustered_fl`, is FedAvg within each architecture.

        All clients of an architecture start from the same weights, as if a server had sent them.

        Raises:
            ConfigError: a number is out of range.
        """
        profile = PROFILES[self.profile]
        return CellConfig(
            dataset="cifar10",
            family="vgg",
            scheme="clustered_fl",
            seed=self.seed,
            model=ModelConfig(width=self.width, init="shared"),
            partition=replace(
                profile.partition,
                num_clients=self.clients,
                num_shards=max(profile.partition.num_shards, self.clients),
                max_train=self.max_train,
                max_test=self.max_test,
            ),
            training=replace(profile.training, local_epochs=self.local_epochs),
        )

    def info(self) -> DatasetInfo:
        """The data set of the job.

        Raises:
            DataError: `data_dir` has no CIFAR-10.
        """
        if self.data_dir is None:
            return find_dataset("cifar10", data="synthetic", data_dir=Path())
        return find_dataset("cifar10", data="real", data_dir=Path(self.data_dir))

    def to_json(self) -> str:
        """Encode the job as text, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Decode the text that `to_json` returned."""
        return cls(**json.loads(text))

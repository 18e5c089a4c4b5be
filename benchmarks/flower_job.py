"""The job of `flower.py`: what both sides are told, and the programs that Flower plays it by."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flexifed.config import CellConfig, ModelConfig
from flexifed.data import DatasetInfo, find_dataset
from flexifed.profiles import PROFILES, ProfileName

CPUS_PER_CLIENT = {"defaults": 2, "tutorial": 1, "lean": 1}
"""By Flower's program: CPUs, and threads, of each client. Flower's own default is two, flexifed's one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """VGGs on CIFAR-10, averaged within each architecture; thin ones, and one local epoch, unless it says otherwise.

    Attributes:
        profile: whose shards, batches, steps and augmentation these are.
        clients: client k has version k modulo 4.
        rounds: of training.
        width: factor on all channels.
        local_epochs: of each client in each round.
        max_train: training samples of a client at most; None for its whole shard, of which it trains on a part in
            each round.
        max_test: test samples of a client at most; None for its whole shard.
        seed: of everything random.
        cpus: so many clients train at a time, each with one thread; of Flower's, see `CPUS_PER_CLIENT`.
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
        """The cell: `clustered_fl` is FedAvg within each architecture.

        All clients of an architecture begin with the weights that a server would send them.

        Raises:
            ConfigError: a number out of range.
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
        """Which data.

        Raises:
            DataError: `data_dir` has no CIFAR-10.
        """
        if self.data_dir is None:
            return find_dataset("cifar10", data="synthetic", data_dir=Path())
        return find_dataset("cifar10", data="real", data_dir=Path(self.data_dir))

    def to_json(self) -> str:
        """As text, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """From what `to_json` made."""
        return cls(**json.loads(text))
